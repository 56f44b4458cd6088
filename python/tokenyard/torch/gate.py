"""Gates with gradients: of the weights, and of the losses that keep experts busy. On the CPU."""
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from .. import _core
from ..arrays import tensor
from ..routing import routed


@dataclass
class Gated:
    """topk_ids [T,K] int64, topk_weights [T,K] float32 with a gradient, load [E] int64; losses() of this batch."""

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    load: torch.Tensor
    _batch: Any

    def losses(self, balance_alpha=0.0, z_alpha=0.0, world=None) -> torch.Tensor:
        """A scalar float32 with a gradient: the balancing loss alpha (E / sum load) sum_e load_e mean_t p_te plus the z loss alpha
        mean_t logsumexp(logits_t)^2. With a world they are those of the tokens of all its ranks (collective), and each rank gets the
        gradient of its own logits: add it on every rank, and do not divide it by their number."""
        return _Losses.apply(self._batch.logits, self._batch, balance_alpha, z_alpha, world)


@dataclass
class _Batch:
    logits: torch.Tensor
    given: Any
    gate: Any
    routing: Any

    def gradient(self, add) -> torch.Tensor:
        """add(d_logits) fills the gradient of logits, float32."""
        gradient = torch.zeros(self.logits.shape, dtype=torch.float32)
        add(tensor(gradient, "gradient"))
        return gradient.to(self.logits.dtype)


def _packed(statistics) -> bytes:
    numbers = [*statistics.load, *statistics.score_sums, statistics.squared_log_sum_exps, statistics.num_tokens]
    return numpy.array(numbers, "<f8").tobytes()  # counts below 2^53


def _unpacked(told):
    *numbers, squares, tokens = numpy.frombuffer(told, "<f8").tolist()
    experts = len(numbers) // 2
    return _core.GateStatistics([int(n) for n in numbers[:experts]], numbers[experts:], squares, int(tokens))


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, batch, weights):
        ctx.batch = batch
        return weights.clone()

    @staticmethod
    def backward(ctx, grad):
        batch, grad = ctx.batch, tensor(grad.float().contiguous(), "gradient of topk_weights")
        return batch.gradient(lambda out: _core.add_weights_gradient(batch.given.core, batch.gate, batch.routing, grad, out)), None, None


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, batch, balance_alpha, z_alpha, world):
        statistics = _core.gate_statistics(batch.given.core, batch.gate, batch.routing)
        if world is not None:
            told = [_unpacked(part) for part in world.all_gather(_packed(statistics))]
            statistics = told[0]
            for other in told[1:]:
                statistics.add(other)
        ctx.batch, ctx.statistics, ctx.alphas = batch, statistics, (balance_alpha, z_alpha)
        return torch.tensor(_core.balance_loss(statistics, balance_alpha) + _core.z_loss(statistics, z_alpha), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        batch, (balance_alpha, z_alpha) = ctx.batch, ctx.alphas

        def add(out):
            _core.add_balance_gradient(batch.given.core, batch.gate, ctx.statistics, balance_alpha * float(grad), out)
            _core.add_z_gradient(batch.given.core, batch.gate, ctx.statistics, z_alpha * float(grad), out)

        return batch.gradient(add), None, None, None, None


def route(logits, gate, *, bias=None, mask=None, given_ids=None) -> Gated:
    """tokenyard.route() of logits [T,E] (float32, bfloat16 or float16 on the CPU) with gradients."""
    routing, given, place = routed(logits.detach(), gate, bias, mask, given_ids)
    ids, weights, load = routing.arrays(place)
    batch = _Batch(logits, given, gate, routing)
    return Gated(ids, _Weights.apply(logits, batch, weights), load, batch)
