"""Collectives with unequal lengths over rows, between CPU memories."""
import numpy

from . import _core
from .arrays import on_cpu, is_torch, shown_as, tensor, torch_if_used


def _rows_like(array, rows):
    shape = (rows, *array.shape[1:])
    if is_torch(array):
        return torch_if_used().empty(shape, dtype=array.dtype)
    return numpy.empty(shape, array.dtype)


class Collectives:
    """Collective calls of one world, made by all ranks in the same order. Counts are rows per rank; zeros are legal.

    Arrays are NumPy's or torch's; results are new arrays of the framework that came in. UsageError for shapes and counts that do not
    fit (the peers' same call fails with the reason), TransportError as on an exchange.
    """

    def __init__(self, world, *, staging_bytes=4 << 20, transport="automatic", timeout_ms=100_000):
        self._world = world
        self._core = _core.Collectives(world._core, staging_bytes, transport, timeout_ms)

    @property
    def world(self):
        """The world that these are calls of."""
        return self._world

    def barrier(self) -> None:
        """Returns when all ranks have come."""
        self._core.barrier()

    def _call(self, call, x, counts, rows, *more):
        x = on_cpu(x, "x")
        out = _rows_like(x, rows)
        call(tensor(x, "x"), counts, tensor(out, "out"), *more)
        return shown_as(out, x.dtype)

    def all_gather_v(self, x, counts):
        """x [counts[rank], ...] of every rank, in rank order: [sum counts, ...]. counts [R], the same on all ranks."""
        return self._call(self._core.all_gather_v, x, counts, sum(counts))

    def reduce_scatter_v(self, x, counts):
        """The sums of x [sum counts, ...] over ranks, of which this rank gets its [counts[rank], ...]: float32 sums in rank order,
        rounded once (float64 stays float64)."""
        return self._call(self._core.reduce_scatter_v, x, counts, counts[self._world.rank])

    def all_to_all_v(self, x, send_counts, receive_counts):
        """send_counts[d] rows of x, ordered by d, go to rank d; receive_counts[s] rows come from each s, ordered by s."""
        return self._call(self._core.all_to_all_v, x, send_counts, sum(receive_counts), receive_counts)

    def __del__(self):
        self._core = None
