"""What this machine and this build can do."""
from dataclasses import dataclass, field
from typing import Any

from . import _core


@dataclass
class Topo:
    """backends: every way to move rows, with the reason and the remedy where one is missing; gpus: those of this process;
    ranks, hosts [R] and links [R][R] ("self", "peer", "network") of the world that was given."""

    backends: list[Any]
    gpus: list[Any]
    ranks: int = 0
    hosts: list[str] = field(default_factory=list)
    links: list[list[str]] = field(default_factory=list)

    def __str__(self):
        lines = [f"{b.kind} {b.name}: {b.availability}" + (f" ({b.reason}; {b.remedy})" if b.reason else "") for b in self.backends]
        lines += [f"gpu {i}: {gpu.name}" for i, gpu in enumerate(self.gpus)]
        lines += [f"rank {rank} on {host}: {' '.join(row)}" for rank, (host, row) in enumerate(zip(self.hosts, self.links))]
        return "\n".join(lines)


def topo(world=None) -> Topo:
    """What can be used here; with a world also its hosts and links (local: no other rank is asked)."""
    found = Topo(_core.backends(), _core.gpu_topology().gpus)
    if world is not None:
        topology = _core.topology(world._core)
        found.ranks, found.hosts, found.links = topology.ranks, topology.hosts, topology.links
    return found
