"""Worlds from torch process groups."""
import os
import secrets
import socket

import torch.distributed as dist

from .. import _core
from ..world import World


def world_from_group(group=None, *, timeout_ms=100_000) -> World:
    """Collective over a torch process group (default: all ranks): its ranks as a world, in the group's order. Any backend; only
    small objects travel through it. The first rank holds the store where they meet, until all of them have let go of their worlds;
    when its interpreter ends before, it waits 5 s for them."""
    size = dist.get_world_size(group)

    def all_gather(value):
        values = [None] * size
        dist.all_gather_object(values, value, group=group)
        return values

    return meet(dist.get_rank(group), size, all_gather, timeout_ms)


def meet(rank, size, all_gather, timeout_ms) -> World:
    """A world of ranks that can already tell each other small objects: all_gather(value) is the list of all ranks' values."""
    if size == 1:
        return World.in_process(1, timeout_ms)[0]
    host = socket.gethostname()
    hosts = all_gather(host)
    address = "127.0.0.1" if len(set(hosts)) == 1 else socket.gethostbyname(hosts[0])
    token = secrets.token_hex(16)
    store = _core.Store(address, size, token) if rank == 0 else None
    address, port, token = all_gather((address, store.port, token) if rank == 0 else None)[0]
    options = _core.WorldOptions()
    options.rank, options.size, options.local_rank = rank, size, int(os.environ.get("LOCAL_RANK", hosts[:rank].count(host)))
    options.address, options.port, options.token = address, port, token
    options.store_elsewhere, options.timeout_ms = True, timeout_ms
    return World(_core.World.connect(options), store=store)
