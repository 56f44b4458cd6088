"""Grouped products and the gated feed-forward with gradients. On the CPU."""
import torch

from .. import _core
from ..arrays import tensor
from ..experts import FeedForward, by_place, product, unpermute


def _to_rows(groups, d_places, shape):
    """The gradient of rows [N,K], or of the shape that they came in, from that of places."""
    rows = unpermute(d_places, groups) if groups.is_gathered else d_places
    return rows.view(shape)


def _sums_per_expert(dy, groups):
    """[L,M] float32."""
    sums = torch.zeros(len(groups.counts), dy.shape[1])
    for expert, (begin, count) in enumerate(zip(groups.begins, groups.counts)):
        sums[expert] = dy[begin:begin + count].float().sum(0)
    return sums


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, groups):
        ctx.save_for_backward(x, w)
        ctx.groups, ctx.bias_dtype = groups, None if bias is None else bias.dtype
        return product(x, groups, w.contiguous(), bias)

    @staticmethod
    def backward(ctx, dy):
        (x, w), groups = ctx.saved_tensors, ctx.groups
        dy, w = dy.contiguous(), w.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            d_places = by_place(dy, groups, w.shape[2])
            _core.grouped_gemm_dgrad(tensor(dy, "dy"), groups._core, tensor(w, "w"), tensor(d_places, "dx"))
            dx = _to_rows(groups, d_places, x.shape)
        if ctx.needs_input_grad[1]:
            dw = torch.zeros(w.shape)
            rows = x.reshape(-1, x.shape[-1])
            _core.grouped_gemm_wgrad(tensor(dy, "dy"), tensor(rows, "x"), groups._core, tensor(dw, "dw"))
        return dx, dw if dw is None else dw.to(w.dtype), _sums_per_expert(dy, groups).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w13, w2, w13_bias, w2_bias, groups, activation):
        ctx.save_for_backward(x, w13, w2, w13_bias, w2_bias)
        ctx.groups, ctx.activation, ctx.saved = groups, activation, _core.ExpertActivations()
        return FeedForward(w13, w2, w13_bias, w2_bias, activation).forward(x, groups, ctx.saved)

    @staticmethod
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        groups, dy, rows = ctx.groups, dy.contiguous(), x.reshape(-1, x.shape[-1])
        d_places = by_place(dy, groups, dy.shape[1])
        gradients = [None if w is None else torch.zeros(w.shape) for w in weights]
        views = [None if g is None else tensor(g, "gradient") for g in gradients]
        FeedForward(*weights, ctx.activation).core.backward(tensor(rows, "x"), tensor(dy, "dy"), ctx.saved, groups._core, tensor(d_places, "dx"), views)
        return _to_rows(groups, d_places, x.shape), *(g if g is None else g.to(w.dtype) for g, w in zip(gradients, weights)), None, None


def grouped_gemm(x, groups, w, bias=None) -> torch.Tensor:
    """tokenyard.grouped_gemm() with gradients for x, w and bias."""
    return _GroupedGemm.apply(x, w, bias, groups)


def feed_forward(x, groups, w13, w2, *, w13_bias=None, w2_bias=None, activation="silu", limit=7.0, alpha=1.702) -> torch.Tensor:
    """tokenyard.feed_forward() with gradients for x, weights and biases. Keeps gate and up of every place, float32, for backward."""
    dense = [None if w is None else w.contiguous() for w in (w13, w2, w13_bias, w2_bias)]
    return _FeedForward.apply(x, *dense, groups, (activation, limit, alpha))
