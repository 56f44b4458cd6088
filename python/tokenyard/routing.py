"""Gate functions, published shapes, and quantisation to fp8."""
from typing import Any, NamedTuple

from . import _core
from .arrays import Frame, tensor
from .errors import UsageError


class Routing(NamedTuple):
    """topk_ids [T,K] int64 (-1: no expert), topk_weights [T,K] float32, load [E] int64 (tokens per expert)."""

    topk_ids: Any
    topk_weights: Any
    load: Any


def route(logits, gate, *, bias=None, mask=None, given_ids=None, dtype=None) -> Routing:
    """The experts and weights of every token; on the CPU.

    logits [T,E] float32, bfloat16 (dtype="bfloat16" for NumPy's uint16) or float16; bias [E] float32 for Gate.bias_corrected;
    mask [T] bool or uint8: 0 gives ids -1 and weights 0; given_ids [T,K]: replay, with the weights that the gate gives them.
    Ties go to the lower expert id; the same bits on every machine. UsageError for what does not fit.
    """
    keep = [None if value is None else tensor(value, what, dtype if what == "logits" else None)
            for value, what in ((logits, "logits"), (bias, "bias"), (mask, "mask"), (given_ids, "given_ids"))]
    views = [None if pair is None else pair[1] for pair in keep]
    return Routing(*_core.route(_core.RoutingInput(*views), gate, Frame(keep[0][0]).place))


def quantise(x, scale_format="float32", *, dtype=None) -> tuple:
    """x [T,H] as (fp8 e4m3 [T,H], scales [T,S]), per block of 128 elements; fp8 is uint8 in NumPy.

    scale_format: "float32", "float32_pow2" (powers of two) or "ue8m0" (their exponents, four per int32).
    """
    array, view = tensor(x, "x", dtype)
    if len(array.shape) != 2:
        raise UsageError(f"x has the shape {list(array.shape)}; expected [T,H]")
    tokens, hidden_size = array.shape
    frame = Frame(array)
    q = frame.empty((tokens, hidden_size), "float8_e4m3")
    scales = frame.empty((tokens, _core.scale_columns(hidden_size, scale_format)), "int32" if scale_format == "ue8m0" else "float32")
    q_kept, q_view = tensor(q, "q", "float8_e4m3")
    _core.quantise(view, q_view, tensor(scales, "scales")[1], scale_format)
    return q_kept, scales


def dequantise(q, scales, dtype="bfloat16", scale_format="float32"):
    """q [T,H] fp8 and its scales as [T,H] of dtype: bfloat16, float16 or float32."""
    array, view = tensor(q, "q", "float8_e4m3")
    x = Frame(array).empty(tuple(array.shape), dtype)
    _core.dequantise(view, tensor(scales, "scales")[1], tensor(x, "x", dtype)[1], scale_format)
    return x
