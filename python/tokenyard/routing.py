"""Gate functions, published shapes, and quantisation to fp8."""
from typing import Any, NamedTuple

from . import _core
from .arrays import Frame, as_array, tensor
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
    logits = as_array(logits, "logits")
    views = [tensor(logits, "logits", dtype)]
    for name, value in (("bias", bias), ("mask", mask), ("given_ids", given_ids)):
        views.append(None if value is None else tensor(as_array(value, name), name))
    return Routing(*_core.route(_core.RoutingInput(*views), gate, Frame.of(logits).place))


def quantise(x, scale_format="float32", *, dtype=None) -> tuple:
    """x [T,H] as (fp8 e4m3 [T,H], scales [T,S]), per block of 128 elements; fp8 is uint8 in NumPy.

    scale_format: "float32", "float32_pow2" (powers of two) or "ue8m0" (their exponents, four per int32).
    """
    x = as_array(x, "x")
    view = tensor(x, "x", dtype)
    if len(x.shape) != 2:
        raise UsageError(f"x has the shape {list(x.shape)}; expected [T,H]")
    tokens, hidden_size = x.shape
    frame = Frame.of(x)
    q = frame.empty((tokens, hidden_size), "float8_e4m3")
    scales = frame.empty((tokens, _core.scale_columns(hidden_size, scale_format)), "int32" if scale_format == "ue8m0" else "float32")
    _core.quantise(view, tensor(q, "q", "float8_e4m3"), tensor(scales, "scales"), scale_format)
    return q, scales


def dequantise(q, scales, dtype="bfloat16", scale_format="float32"):
    """q [T,H] fp8 and its scales as [T,H] of dtype: bfloat16, float16 or float32."""
    q, scales = as_array(q, "q"), as_array(scales, "scales")
    x = Frame.of(q).empty(tuple(q.shape), dtype)
    _core.dequantise(tensor(q, "q", "float8_e4m3"), tensor(scales, "scales"), tensor(x, "x", dtype), scale_format)
    return x
