"""Parallel configuration: from the few sizes that a caller cares about to all of them, and to who is who.

Pure: every rank computes the same answer for itself. docs/parallel.md says what each size means and what holds between them.
"""
from dataclasses import dataclass, fields
from typing import NamedTuple

from . import _core
from .errors import UsageError

__all__ = ["Config", "Coordinates", "solve"]


class Coordinates(NamedTuple):
    """Where a rank is: (outer, attn_dp, attn_tp, attn_cp) for attention, (outer, ep, mlp_tp) for the experts; the last varies
    fastest. A node holds consecutive ranks."""

    rank: int
    node: int
    outer: int
    attn_dp: int
    attn_tp: int
    attn_cp: int
    ep: int
    mlp_tp: int


def _coordinates(core, rank):
    at = core.coordinates(rank)
    return Coordinates(*(getattr(at, name) for name in Coordinates._fields))


@dataclass(frozen=True)
class Config:
    """All sizes; mlp_tp is the tensor parallelism of the experts. UsageError where they break an invariant, with its numbers.

    device_count = outer_dp * attn_dp * attn_tp * attn_cp = outer_dp * ep * mlp_tp.
    """

    nnodes: int = 1
    device_count: int = 1
    dp: int = 1
    tp: int = 1
    ep: int = 1
    cp: int = 1
    outer_dp: int = 1
    attn_dp: int = 1
    attn_tp: int = 1
    attn_cp: int = 1
    mlp_tp: int = 1

    def __post_init__(self):
        _core.check_parallel(self._as_core())

    def _as_core(self):
        core = _core.ParallelConfig()
        for field in fields(self):
            setattr(core, field.name, getattr(self, field.name))
        return core

    def coordinates(self, rank) -> Coordinates:
        """Where a rank is."""
        return _coordinates(self._as_core(), rank)

    @property
    def ranks(self) -> list[Coordinates]:
        """The coordinates of all ranks."""
        core = self._as_core()
        return [_coordinates(core, rank) for rank in range(self.device_count)]

    def split_arguments(self, kind, rank) -> tuple[int, int]:
        """(color, key) of World.split() for one of the sub-worlds "attention", "ep", "tp", "ep_tp" and "outer"."""
        return self._as_core().split_arguments(kind, rank)

    def sub_world_size(self, kind) -> int:
        """The ranks of one sub-world of this kind."""
        return self._as_core().sub_world_size(kind)

    def sub_world(self, world, kind):
        """Collective over a world of device_count ranks: this rank's sub-world of a kind."""
        return world.split(*self.split_arguments(kind, world.rank))

    def placement(self, num_experts):
        """Where the experts are in one "ep_tp" world: windows over ep, each expert cut into mlp_tp shards."""
        return _core.Placement.tensor_parallel(num_experts, self.ep, self.mlp_tp)

    def to_json(self) -> str:
        """The sizes by these names, and "ranks": a list of coordinates. What `tokenyard parallel --json` writes has it, too."""
        return self._as_core().to_json()


def solve(*, nnodes=1, device_count=None, dp=None, tp=None, ep=None, cp=None, outer_dp=None, attn_dp=None, attn_tp=None, attn_cp=None,
          mlp_tp=None, transport="automatic") -> Config:
    """The configuration that holds every given size and every invariant: with the smallest tp, then the most devices, then the
    fewest outer replicas. A size that is None is derived. UsageError names the invariant that cannot hold, with its numbers.

    transport: "inproc", "shm" and "cuda_peer" do not leave a host, so they need nnodes = 1.
    """
    given = dict(locals())
    request = _core.ParallelRequest()
    for name, value in given.items():
        if value is not None:
            try:
                setattr(request, name, value)
            except TypeError:
                expected = "a name" if name == "transport" else "a whole number"
                raise UsageError(f"{name} = {value!r} is a {type(value).__name__}; expected {expected}") from None
    core = _core.solve_parallel(request)
    return Config(**{field.name: getattr(core, field.name) for field in fields(Config)})
