"""Worlds: who the ranks are, and what each pair of them can do."""
import atexit
import threading
import time
import weakref

from . import _core

FAREWELL_MS = 5000  # for the others to let go of a store when the interpreter of the rank that holds it ends: who started it is to learn that soon
_TICK_MS = 100
_holders = weakref.WeakSet()  # worlds with a store


def _keep_while_used(store):
    """Until no other rank uses a store. Not by whoever lets go of it: they may first be waiting for this rank elsewhere."""
    while not store.wait_until_unused(_TICK_MS, but_rank=0):
        if not threading.main_thread().is_alive():  # the interpreter is ending
            store.wait_until_unused(FAREWELL_MS, but_rank=0)
            return


@atexit.register
def _end_stores():
    """Of worlds that live at exit. Their own ends come when threads can no longer be started, and maybe before those of their exchanges."""
    _core.limit_farewells(FAREWELL_MS)
    end = time.monotonic() + FAREWELL_MS / 1000
    for world in list(_holders):
        world._store.wait_until_unused(max(0, int(1000 * (end - time.monotonic()))), but_rank=0)
        world._store = None


class World:
    """A set of ranks. Calls on one world are made in the same order by all ranks; every wait has the world's deadline.

    TransportError names ranks that are missing or lost. Ctrl-C ends a wait.
    """

    def __init__(self, core, *, store=None, parent=None):
        self._core = core
        self._store = store  # the store that this process, as rank 0, holds for all ranks: it must not vanish under them
        if store is not None:
            _holders.add(self)
        self._parent = parent  # what a part of a world needs of it

    def __del__(self):
        self._core = None
        if getattr(self, "_store", None) is not None:
            threading.Thread(target=_keep_while_used, args=(self._store,), name="tokenyard store").start()

    @staticmethod
    def from_env() -> "World":
        """From RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and TOKENYARD_PORT (default MASTER_PORT + 1), TOKENYARD_TOKEN,
        TOKENYARD_TIMEOUT_MS, as torchrun, mpirun and `tokenyard launch` set them. Without any rank: a world of one."""
        return World(_core.World.from_env())

    @staticmethod
    def connect(rank, size, *, port, address="127.0.0.1", local_rank=0, token="", store_elsewhere=False, timeout_ms=100_000) -> "World":
        """Meets the other ranks at address:port, where rank 0 listens (or a launcher, with store_elsewhere). A token that all
        ranks share is required when the address is not loopback."""
        options = _core.WorldOptions()
        options.rank, options.size, options.local_rank = rank, size, local_rank
        options.address, options.port, options.token = address, port, token
        options.store_elsewhere, options.timeout_ms = store_elsewhere, timeout_ms
        return World(_core.World.connect(options))

    @staticmethod
    def from_group(group=None, *, timeout_ms=100_000) -> "World":
        """The ranks of a torch process group (default: all), in its order. Collective over the group, of any backend."""
        from .torch.groups import world_from_group

        return world_from_group(group, timeout_ms=timeout_ms)

    @staticmethod
    def in_process(size, timeout_ms=100_000) -> list["World"]:
        """`size` ranks of this process, for one thread each; element r belongs to rank r. run_ranks(processes=False) uses it."""
        return [World(core) for core in _core.World.in_process(size, timeout_ms)]

    rank = property(lambda self: self._core.rank, doc="The number of this rank, from 0.")
    size = property(lambda self: self._core.size, doc="How many ranks there are.")
    local_rank = property(lambda self: self._core.local_rank, doc="The number of this rank among those of its host.")
    timeout_ms = property(lambda self: self._core.timeout_ms, doc="The deadline of every wait.")
    is_in_process = property(lambda self: self._core.is_in_process, doc="Whether all ranks are threads of this process.")
    generation = property(lambda self: self._core.generation, doc="Never the same for two worlds of one rendezvous.")

    def link(self, peer) -> str:
        """"self", "peer" (both address each other's memory) or "network"."""
        return self._core.link(peer)

    def host(self, peer) -> str:
        """The name of the machine that a rank is on."""
        return self._core.host(peer)

    def alive(self, peer) -> bool:
        """False once the rank's process has ended. Never waits."""
        return self._core.alive(peer)

    def all_gather(self, mine: bytes) -> list[bytes]:
        """Collective over small control data (< 16 MiB per rank): element r is what rank r gave."""
        return self._core.all_gather(mine)

    def barrier(self) -> None:
        """Collective: returns when all ranks have come."""
        self._core.barrier()

    def split(self, color, key=0) -> "World | None":
        """Collective. Ranks of one color form a world, numbered by (key, rank); color < 0: none."""
        part = self._core.split(color, key)
        return None if part is None else World(part, parent=self)

    def survivors(self) -> tuple["World", list[int]]:
        """Collective over the ranks that are left: (the smaller world, their former ranks)."""
        left, ranks = self._core.survivors()
        return World(left, parent=self), ranks

    def leave(self) -> None:
        """Marks this rank as lost for the others."""
        self._core.leave()

    def __repr__(self):
        return f"<World rank {self.rank} of {self.size}>"
