"""Grouped products and the gated feed-forward with gradients."""
import torch

from ..arrays import tensor
from ..experts import FeedForward, backend, by_place, on_device, product, unpermute


def _to_rows(groups, d_places, shape):
    """The gradient of rows [N,K], or of the shape that they came in, from that of places."""
    rows = unpermute(d_places, groups) if groups.is_gathered else d_places
    return rows.view(shape)


def _sums_per_expert(dy, groups):
    """[L,M] float32."""
    if on_device(dy):  # as a product with ones where a place is an expert's: nobody waits for the counts
        table, place = groups.table(dy), torch.arange(len(dy), device=dy.device)
        begins = table["begins"] if table["begins"] is not None else torch.arange(len(table["counts"]), device=dy.device) * table["capacity"]
        begins = begins[:len(table["counts"]), None]
        is_mine = (place >= begins) & (place < begins + table["counts"][:, None])
        return is_mine.float() @ torch.where(is_mine.any(0)[:, None], dy.float(), 0.0)
    sums = torch.zeros(len(groups.counts), dy.shape[1])
    for expert, (begin, count) in enumerate(zip(groups.begins, groups.counts)):
        sums[expert] = dy[begin:begin + count].float().sum(0)
    return sums


def _zeros(like):
    return None if like is None else torch.zeros(like.shape, device=like.device)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, groups):
        ctx.save_for_backward(x, w)
        ctx.groups, ctx.bias_dtype = groups, None if bias is None else bias.dtype
        return product(x, groups, w.contiguous(), bias)

    @staticmethod
    def backward(ctx, dy):
        (x, w), groups = ctx.saved_tensors, ctx.groups
        dy, w, rows = dy.contiguous(), w.contiguous(), x.reshape(-1, x.shape[-1])
        compute = backend(groups, rows)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            d_places = by_place(compute, dy, groups, w.shape[2])
            compute.dgrad(tensor(dy, "dy"), tensor(w, "w"), tensor(d_places, "dx"))
            dx = _to_rows(groups, d_places, x.shape)
        if ctx.needs_input_grad[1]:
            dw = _zeros(w)
            compute.wgrad(tensor(dy, "dy"), tensor(rows, "x"), tensor(dw, "dw"))
        return dx, dw if dw is None else dw.to(w.dtype), _sums_per_expert(dy, groups).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w13, w2, w13_bias, w2_bias, groups, activation):
        ctx.save_for_backward(x, w13, w2, w13_bias, w2_bias)
        y, saved = FeedForward(x, (w13, w2, w13_bias, w2_bias), activation).forward(x, groups, saves=True)
        ctx.groups, ctx.activation, ctx.saved = groups, activation, saved
        return y

    @staticmethod
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        groups, dy, rows = ctx.groups, dy.contiguous(), x.reshape(-1, x.shape[-1])
        compute = backend(groups, rows)
        d_places = by_place(compute, dy, groups, dy.shape[1])
        gradients = [_zeros(w) for w in weights]
        views = [None if g is None else tensor(g, "gradient") for g in gradients]
        compute.backward(FeedForward(x, weights, ctx.activation), tensor(rows, "x"), ctx.saved, tensor(dy, "dy"), tensor(d_places, "dx"), views)
        return _to_rows(groups, d_places, x.shape), *(g if g is None else g.to(w.dtype) for g, w in zip(gradients, weights)), None, None


def grouped_gemm(x, groups, w, bias=None) -> torch.Tensor:
    """tokenyard.grouped_gemm() with gradients for x, w and bias."""
    return _GroupedGemm.apply(x, w, bias, groups)


def feed_forward(x, groups, w13, w2, *, w13_bias=None, w2_bias=None, activation="silu", limit=7.0, alpha=1.702) -> torch.Tensor:
    """tokenyard.feed_forward() with gradients for x, weights and biases. Keeps gate and up of every place for backward (float32; on a
    GPU in the dtype of x)."""
    dense = [None if w is None else w.contiguous() for w in (w13, w2, w13_bias, w2_bias)]
    return _FeedForward.apply(x, *dense, groups, (activation, limit, alpha))
