"""Collectives with unequal lengths over rows, between CPU memories or those of GPUs."""
import numpy

from . import _core
from .arrays import as_array, is_torch, shown_as, tensor, torch_if_used
from .errors import UsageError


def _rows_like(array, rows):
    shape = (rows, *array.shape[1:])
    if is_torch(array):
        return torch_if_used().empty(shape, dtype=array.dtype, device=array.device)
    return numpy.empty(shape, array.dtype)


class Collectives:
    """Collective calls of one world, made by all ranks in the same order. Counts are rows per rank; zeros are legal.

    Arrays are NumPy's or torch's; results are new arrays of the framework that came in. UsageError for shapes and counts that do not
    fit (the peers' same call fails with the reason), TransportError as on an exchange.
    device="cuda": torch tensors on the current GPU, in the order of torch's current stream; over peer memory where all ranks are on one
    host, else by NCCL, with a GPU for each rank and a build with it. Calls do not wait: wait() is where what went wrong is told (by
    NCCL, a UsageError is not told to the peers). Before such an object goes, all ranks must be done with it: wait() and barrier().
    """

    def __init__(self, world, *, device="cpu", staging_bytes=4 << 20, transport="automatic", timeout_ms=100_000):
        if device not in ("cpu", "cuda"):
            raise UsageError(f"device = {device!r}; expected 'cpu' or 'cuda'")
        self._world, self._device = world, device
        if device == "cuda":
            self._core = _core.DeviceCollectives(world._core, -1, timeout_ms)
        else:
            self._core = _core.Collectives(world._core, staging_bytes, transport, timeout_ms)

    @property
    def world(self):
        """The world that these are calls of."""
        return self._world

    def barrier(self) -> None:
        """Returns when all ranks have come."""
        (self._world if self._device == "cuda" else self._core).barrier()

    def wait(self) -> None:
        """cuda: returns when what was called on the current stream is done; TransportError when it cannot be."""
        if self._device == "cuda":
            self._core.wait(*self._stream())

    def _stream(self):
        return (torch_if_used().cuda.current_stream().cuda_stream,) if self._device == "cuda" else ()

    def _call(self, call, x, counts, rows, *more):
        x = as_array(x, "x")
        given = x.device.type if is_torch(x) else "cpu"
        if given != self._device:
            raise UsageError(f"x is on {given} but these collectives are of device = {self._device!r}; move it, or make them with device={given!r}")
        if self._device == "cuda":
            x = x.contiguous()
        out = _rows_like(x, rows)
        call(*self._stream(), tensor(x, "x"), counts, tensor(out, "out"), *more)
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
