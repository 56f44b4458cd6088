"""Residual + RMSNorm, alone and with the collectives around it: from tensor-parallel attention to an MoE layer, and back."""
from typing import Any, NamedTuple

from . import _core
from .arrays import Frame, as_array, current_stream, is_torch, shown_as, tensor, writable
from .errors import UsageError


class Normed(NamedTuple):
    """What a norm gives, and what its backward needs: residual [t,H] (x + bias + residual, rounded), out [t,H] (of all ranks [T,H]),
    inverse [t] float32 (1 / root mean square of the rows of residual), and tokens, T."""

    residual: Any
    out: Any
    inverse: Any
    tokens: int


class RmsNorm:
    """out = r * weight / sqrt(mean(r^2) + epsilon) of r = x + bias + residual, which goes on as the residual.

    Arrays are NumPy's or torch's where the weight is, on the CPU or one GPU (enqueued on torch's current stream, with collectives of
    device="cuda"), rows of one dtype, float32, bfloat16 or float16; weight [H] any of them (dtype: what it means
    in NumPy); bias [H] of the rows' dtype. Results are new arrays of the rows' framework. Of the T tokens of a group of g ranks,
    rank r has a slice of T // g + (r < T % g), maybe none; it takes part all the same. Each method with `collectives` is a call of them.
    """

    def __init__(self, weight, epsilon=1e-6, *, dtype=None):
        self.weight = as_array(weight, "weight")
        self._gpu = self.weight.get_device() if is_torch(self.weight) and self.weight.is_cuda else None
        self._core = _core.RmsNorm(tensor(self.weight, "weight", dtype), epsilon)

    def __call__(self, x, residual=None, *, bias=None, dtype=None) -> Normed:
        """x, residual [T,H]."""
        return self._forward(_core.residual_norm, (x, residual, bias), dtype, len(x))

    def reduce_scatter(self, collectives, x, residual=None, *, bias=None, dtype=None) -> Normed:
        """x [T,H]: partial sums of this rank, which are summed over the ranks; residual and both results are of this rank's slice."""
        call = lambda *rest: _core.reduce_scatter_norm(collectives._core, *rest)
        return self._forward(call, (x, residual, bias), dtype, _slice_of(collectives, len(x)))

    def all_gather(self, collectives, x, tokens, residual=None, *, bias=None, dtype=None) -> Normed:
        """x, residual [t,H] of this rank's slice of `tokens`; out [T,H] has the slices of all ranks."""
        call = lambda *rest: _core.norm_all_gather(collectives._core, *rest)
        return self._forward(call, (x, residual, bias), dtype, len(x), tokens)

    def backward(self, normed, d_out, d_residual=None, *, dtype=None) -> tuple:
        """(d_x, d_weight [H] float32): the gradient of x is that of residual too, and summed over rows of bias. d_residual: of what else
        was made of normed.residual."""
        return self._backward(_core.residual_norm_backward, normed, d_out, d_residual, dtype)

    def reduce_scatter_backward(self, collectives, normed, d_out, d_residual=None, *, dtype=None) -> tuple:
        """(d_x [T,H] of this rank's partial sums, gradient of residual [t,H], d_weight): d_weight is the share of this rank's slice."""
        call = lambda *rest: _core.reduce_scatter_norm_backward(collectives._core, *rest)
        d_slice, d_x, d_weight = self._backward(call, normed, d_out, d_residual, dtype, normed.tokens)
        return d_x, d_slice, d_weight

    def all_gather_backward(self, collectives, normed, d_out, d_residual=None, *, dtype=None) -> tuple:
        """(d_x [t,H], d_weight): d_out [T,H] is what this rank made of the gathered rows; d_weight the share of this rank's slice."""
        call = lambda *rest: _core.norm_all_gather_backward(collectives._core, *rest)
        return self._backward(call, normed, d_out, d_residual, dtype)

    def _place(self, value, what):
        """As as_array(), where the weight is."""
        if value is None:
            return None
        array = as_array(value, what)
        gpu = array.get_device() if is_torch(array) and array.is_cuda else None
        if gpu != self._gpu:
            named = ["the CPU" if at is None else f"cuda:{at}" for at in (gpu, self._gpu)]
            raise UsageError(f"{what} is on {named[0]} and the norm's weight on {named[1]}; move one of them")
        return array

    def _frame(self, array):
        return Frame.of(array) if self._gpu is None else Frame.of(array, "cuda", self._gpu)

    def _stream(self):
        return () if self._gpu is None else (current_stream(self._gpu),)

    def _forward(self, call, arrays, dtype, rows, gathered=None):
        x, residual, bias = (self._place(array, name) for name, array in zip(("x", "residual", "bias"), arrays))
        views = [None if array is None else tensor(array, name, dtype) for name, array in (("x", x), ("residual", residual), ("bias", bias))]
        frame = self._frame(x)
        kept, out = (frame.empty((count, *x.shape[1:]), views[0].dtype) for count in (rows, rows if gathered is None else gathered))
        inverse = frame.empty((rows,), "float32")
        call(views, self._core, [writable(kept, "residual", dtype), writable(out, "out", dtype), writable(inverse, "inverse")], *self._stream())
        return Normed(shown_as(kept, x.dtype), shown_as(out, x.dtype), inverse, len(x) if gathered is None else gathered)

    def _backward(self, call, normed, d_out, d_residual, dtype, *more_rows):
        """more_rows: of further results between that of normed.residual's shape and d_weight."""
        kept, d_residual = self._place(normed.residual, "residual"), self._place(d_residual, "d_residual")
        views = [tensor(kept, "residual", dtype), None if d_residual is None else tensor(d_residual, "d_residual", dtype),
                 tensor(self._place(d_out, "d_out"), "d_out", dtype), tensor(normed.inverse, "inverse")]
        frame = self._frame(kept)
        found = [frame.empty((rows, kept.shape[1]), views[0].dtype) for rows in (len(kept), *more_rows)]
        d_weight = frame.empty(tuple(self.weight.shape), "float32")
        d_weight[...] = 0
        call(views, self._core, [*(tensor(array, "a gradient", dtype) for array in found), tensor(d_weight, "d_weight")], *self._stream())
        return *(shown_as(array, kept.dtype) for array in found), d_weight


def _slice_of(collectives, tokens):
    return _core.slice_counts(tokens, collectives.world.size)[collectives.world.rank]
