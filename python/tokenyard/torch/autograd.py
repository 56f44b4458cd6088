"""Differentiable dispatch and combine. Collective, forward and backward: all ranks go through both in the same order."""
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError


@dataclass
class Dispatched:
    """What the experts of this rank get: ordinary tensors, not a lease.

    rows [N,H] (token_major) or [N',H] (expert_major, zeros as padding) and row_weights [N,K] or [N'] carry gradients; received has
    the metadata.
    """

    rows: torch.Tensor
    row_weights: torch.Tensor
    received: Any
    padding: torch.Tensor | None = None  # bool per row of expert_major with alignment

    @property
    def handle(self):
        return self.received.handle


def _without_padding(gradient, padding):
    """Rows of padding hold anything in a gradient that travelled."""
    return gradient if padding is None else gradient.masked_fill_(padding[:, None], 0)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, x, topk_weights, topk_ids, options, results):
        received = exchange.dispatch(x, topk_ids, topk_weights, copy_out=True, zero_padding=options["layout"] == "expert_major", **options)
        results.append(received)
        rows, row_weights = received.rows, received.row_weights.clone()
        ctx.exchange, ctx.handle, ctx.weigh = exchange, received.handle, topk_weights is not None and topk_weights.requires_grad
        ctx.tokens = x.shape[0]
        if not ctx.weigh:
            ctx.mark_non_differentiable(row_weights)
        return rows, row_weights

    @staticmethod
    def backward(ctx, grad_rows, grad_row_weights):
        # A combine of the rows' gradients, in memory of torch: on a GPU the exchange's own would not know who reads it.
        grad_x = torch.empty(ctx.tokens, grad_rows.shape[1], dtype=grad_rows.dtype, device=grad_rows.device)
        weights = {"row_weights": grad_row_weights.contiguous()} if ctx.weigh else {}
        result = ctx.exchange.combine(grad_rows.contiguous(), ctx.handle, out=grad_x, **weights)
        return None, grad_x, result[1].clone() if ctx.weigh else None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, rows, topk_weights, dispatched, weighting):
        ctx.save_for_backward(rows, topk_weights)
        ctx.exchange, ctx.handle, ctx.padding, ctx.weighting = exchange, dispatched.handle, dispatched.padding, weighting
        return exchange.combine(rows.contiguous(), dispatched.handle, weighting=weighting, **_source_weights(weighting, topk_weights))

    @staticmethod
    def backward(ctx, grad):
        rows, topk_weights = ctx.saved_tensors
        if ctx.weighting in ("none", "at_input"):  # the gradient is a dispatch, straight into memory of torch
            received = ctx.exchange.dispatch(grad.contiguous(), handle=ctx.handle, copy_out=True)
            return None, _without_padding(received.rows, ctx.padding), None, None, None
        received, grad_weights = ctx.exchange.combine_backward(
            ctx.handle, grad.contiguous(), rows.contiguous(), weighting=ctx.weighting, **_source_weights(ctx.weighting, topk_weights))
        grad_rows = _without_padding(received.rows.clone(), ctx.padding)
        return None, grad_rows, grad_weights.clone() if ctx.needs_input_grad[2] else None, None, None


def _source_weights(weighting, topk_weights):
    return {"source_weights": topk_weights} if weighting == "at_source" else {}


def _float32(weights):
    return None if weights is None else weights.float()


def dispatch(exchange, x, topk_ids, topk_weights=None, *, layout="expert_major", alignment=1, **options) -> Dispatched:
    """Exchange.dispatch with gradients for x and, through row_weights, for topk_weights. layout: token_major or expert_major.

    The backward pass is a combine of the rows' gradient, along which the gradient of row_weights travels when topk_weights needs one
    (on all ranks, or on none).
    """
    if layout not in ("token_major", "expert_major"):
        raise UsageError(f"layout = {layout!r}; the differentiable dispatch has token_major and expert_major")
    results = []
    given = {"layout": layout, "alignment": alignment, **options}
    rows, row_weights = _Dispatch.apply(exchange, x, _float32(topk_weights), topk_ids, given, results)
    return Dispatched(rows, row_weights, results[0], results[0].source_rank < 0 if alignment > 1 else None)


def combine(exchange, rows, dispatched, *, weighting="none", topk_weights=None) -> torch.Tensor:
    """Exchange.combine [T,H] of what the experts made of dispatched.rows, with gradients for rows and, with weighting = at_expert
    (the topk_weights that were dispatched) or at_source (any), for topk_weights [T,K]."""
    if weighting == "at_source" and topk_weights is None:
        raise UsageError("weighting = 'at_source' without topk_weights; give the weights of this rank's tokens")
    return _Combine.apply(exchange, rows, _float32(topk_weights), dispatched, weighting)
