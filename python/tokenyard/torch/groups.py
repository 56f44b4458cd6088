"""Worlds from torch process groups."""
import os
import secrets
import socket

import torch.distributed as dist

from .. import _core
from ..world import World


def world_from_group(group=None, *, timeout_ms=100_000) -> World:
    """Collective over a torch process group (default: all ranks): its ranks as a world, in the group's order. Any backend; only
    small objects travel through it. The first rank holds the store where they meet, until all of them have let go of their worlds."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1:
        return World.in_process(1, timeout_ms)[0]
    host = socket.gethostname()
    hosts = [None] * size
    dist.all_gather_object(hosts, host, group=group)
    address = "127.0.0.1" if len(set(hosts)) == 1 else socket.gethostbyname(hosts[0])
    store, meeting = None, [None] * size
    if rank == 0:
        token = secrets.token_hex(16)
        store = _core.Store(address, size, token, timeout_ms)
        mine = (address, store.port, token)
    else:
        mine = None
    dist.all_gather_object(meeting, mine, group=group)
    address, port, token = meeting[0]
    local_rank = int(os.environ.get("LOCAL_RANK", hosts[:rank].count(host)))
    options = _core.WorldOptions()
    options.rank, options.size, options.local_rank = rank, size, local_rank
    options.address, options.port, options.token = address, port, token
    options.store_elsewhere, options.timeout_ms = True, timeout_ms
    return World(_core.World.connect(options), store=store)
