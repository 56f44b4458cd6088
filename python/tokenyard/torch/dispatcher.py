"""MoEDispatcher: tokens to experts and back in six stages, whatever moves them."""
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError
from ..exchange import Exchange
from .kinds import AllGather, AllToAll, Direct, Single
from .work import Gradients, Stream, Thread, Work, stage, wait_in_backward

KINDS = ("auto", "single", "all_gather", "all_to_all", "direct")


@dataclass
class Prepared:
    """Inputs of dispatch, ready to travel; or of combine, weighted."""

    inputs: tuple[torch.Tensor, ...]
    ids: torch.Tensor | None = None
    gradients: Gradients | None = None  # of an asynchronous backward
    experts: "ExpertInput | None" = None


@dataclass
class Started:
    """dispatch or combine under way; work.wait() and work.ready() are there for who wants to know."""

    prepared: Prepared
    work: Work


@dataclass
class ExpertInput:
    """rows [N',H] grouped by local expert, within it by (source rank, token, k); tokens_per_expert [L]; row_weights [N'] float32."""

    rows: torch.Tensor
    row_weights: torch.Tensor
    tokens_per_expert: list[int]
    saved: Any


class MoEDispatcher:
    """Brings tokens to their experts and the weighted sums of what those computed back: y[t] = sum over k of w[t,k] f_e(x[t]).

    kind: "single" (a world of one), "all_gather", "all_to_all" (collectives; on GPUs over peer memory or NCCL), "direct" (the exchange), or "auto": single or direct.
    All give the same sums, for inputs and gradients (up to the order of float32 sums over a rank's own experts). Stages, in order:

        p = d.dispatch_preprocess(x, topk_ids, topk_weights)     s = d.dispatch(p)     e = d.dispatch_postprocess(s)
        out = experts(e.rows, e.tokens_per_expert)
        p = d.combine_preprocess(e, out)                         s = d.combine(p)      y = d.combine_postprocess(s)

    With async_op=True in the two preprocess stages dispatch and combine return at once, in forward and backward, and what is computed
    before the postprocess stage, or before the gradients of the preprocess stage's inputs are needed, runs beside them. Every rank goes
    through the same stages in the same order, in backward, too. x [T,H]; topk_ids [T,K], negative: no expert; topk_weights [T,K],
    which travel as float32.
    """

    def __init__(self, world, placement, *, hidden_size, top_k, max_tokens_per_rank, dtype="bfloat16", kind="auto", device="cpu", timeout_ms=0,
                 exchange=None, **options):
        """exchange: one to share (it must have been made for these shapes); else kind "direct" makes its own, with `options`."""
        if kind not in KINDS:
            raise UsageError(f"kind = {kind!r}; expected one of {', '.join(KINDS)}")
        if kind == "auto":
            kind = "single" if world.size == 1 and exchange is None else "direct"
        if kind == "single" and world.size != 1:
            raise UsageError(f"kind = 'single' in a world of {world.size} ranks; use 'direct', or 'auto'")
        self.kind, self.world, self.placement = kind, world, placement
        self._runner = Thread() if device == "cpu" else Stream()
        if kind == "direct":
            if exchange is None:
                exchange = Exchange(world, placement, hidden_size=hidden_size, top_k=top_k, max_tokens_per_rank=max_tokens_per_rank, dtype=dtype,
                                    device=device, timeout_ms=timeout_ms, **options)
            self._kind = Direct(exchange, placement)
        elif kind == "single":
            self._kind = Single(world, placement, device)
        else:
            self._kind = {"all_gather": AllGather, "all_to_all": AllToAll}[kind](world, placement, device, timeout_ms or world.timeout_ms)

    @staticmethod
    def _prepare(inputs, async_op):
        if not async_op or not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
            return Prepared(inputs)
        gradients = Gradients()
        return Prepared(wait_in_backward(gradients, *inputs), gradients=gradients)

    def _start(self, prepared, async_op, task):
        def run():
            with torch.no_grad():
                return task()

        return Started(prepared, self._runner.run(run, async_op))

    def dispatch_preprocess(self, x, topk_ids, topk_weights, *, async_op=False) -> Prepared:
        if x.dim() != 2 or topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
            raise UsageError(f"x is {list(x.shape)}, topk_ids {list(topk_ids.shape)}, topk_weights {list(topk_weights.shape)}; expected [T,H], [T,K], [T,K]")
        prepared = self._prepare((x, topk_weights.float()), async_op)
        prepared.ids = topk_ids
        return prepared

    def dispatch(self, prepared, *, async_op=False) -> Started:
        x, weights = (tensor.detach() for tensor in prepared.inputs)
        return self._start(prepared, async_op, lambda: self._kind.dispatch(x, prepared.ids, weights))

    def dispatch_postprocess(self, started) -> ExpertInput:
        rows, row_weights, counts, saved = started.work.wait()
        prepared, kind = started.prepared, self._kind
        rows, row_weights = stage(self._runner, prepared.gradients, lambda *grads: kind.dispatch_backward(saved, *grads), (rows, row_weights),
                                  prepared.inputs)
        return ExpertInput(rows, row_weights, counts, saved)

    def combine_preprocess(self, experts, rows, *, async_op=False) -> Prepared:
        if rows.shape[:1] != experts.rows.shape[:1]:
            raise UsageError(f"rows is {list(rows.shape)}; expected one row for each of the {experts.rows.shape[0]} rows of the dispatch")
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        weighted = (rows.to(wide) * experts.row_weights.to(wide)[:, None]).to(rows.dtype)
        prepared = self._prepare((weighted,), async_op)
        prepared.experts = experts
        return prepared

    def combine(self, prepared, *, async_op=False) -> Started:
        rows = prepared.inputs[0].detach()
        return self._start(prepared, async_op, lambda: self._kind.combine(prepared.experts.saved, rows))

    def combine_postprocess(self, started) -> torch.Tensor:
        sums, prepared, kind = started.work.wait(), started.prepared, self._kind
        saved = prepared.experts.saved
        return stage(self._runner, prepared.gradients, lambda grad: (kind.combine_backward(saved, grad),), (sums,), prepared.inputs)[0]

    def __call__(self, x, topk_ids, topk_weights, experts, *, async_op=False) -> torch.Tensor:
        """All six stages: experts(rows, tokens_per_expert) computes one row for each."""
        given = self.dispatch_postprocess(self.dispatch(self.dispatch_preprocess(x, topk_ids, topk_weights, async_op=async_op), async_op=async_op))
        prepared = self.combine_preprocess(given, experts(given.rows, given.tokens_per_expert), async_op=async_op)
        return self.combine_postprocess(self.combine(prepared, async_op=async_op))
