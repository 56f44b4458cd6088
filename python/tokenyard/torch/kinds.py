"""Four ways to bring rows to experts and sums back: the same results and gradients, other means.

A kind has four calls on plain tensors, all collective except for single:
    dispatch(x, ids, weights) -> rows [N',H], row_weights [N'], counts [L] (list), saved     rows grouped by local expert
    dispatch_backward(saved, grad_rows, grad_row_weights) -> gradients of x [T,H] and weights [T,K]
    combine(saved, rows) -> sums [T,H]
    combine_backward(saved, grad_sums) -> gradient of rows
Within an expert rows are ordered by (source rank, token, k). Sums over the experts of a rank are taken in float32 (float64 for
float64) and rounded, then those over ranks, ascending, and rounded.
"""
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from ..collectives import Collectives
from ..exchange import Exchange


def sum_rows(rows, index, count):
    """[count,H]: the sums of the rows that go to each index."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    sums = torch.zeros((count, *rows.shape[1:]), dtype=wide, device=rows.device)
    return sums.index_add_(0, index, rows.to(wide)).to(rows.dtype)


class LocalExperts:
    """Which choices go to which local expert of a rank."""

    def __init__(self, placement, device):
        self._placement = placement
        self._tables = []
        for rank in range(placement.ranks):
            table = torch.full((placement.num_experts + 1,), -1, dtype=torch.int64)
            for local, expert in enumerate(placement.local_experts(rank)):
                table[expert] = local
            self._tables.append(table.to(device))

    def of(self, rank, source, ids):
        """[T,K]: the local expert of `rank` that serves each choice of `source`'s tokens, or -1."""
        local = self._tables[rank][torch.where(ids < 0, self._placement.num_experts, ids)]
        if self._placement.max_replicas > 1:
            for token, k in (local >= 0).nonzero().tolist():
                expert = int(ids[token, k])
                replica = self._placement.replicas(expert)[self._placement.replica_for(expert, source, token)]
                if rank not in replica.shard_ranks:
                    local[token, k] = -1
        return local


@dataclass
class Grouping:
    """Rows grouped by expert out of tokens: row i is token[i], and its choice at[i] (index into the flat [T*K])."""

    token: torch.Tensor
    at: torch.Tensor
    counts: list[int]

    @staticmethod
    def of(local_ids, num_local):
        flat = local_ids.flatten()
        at = (flat >= 0).nonzero()[:, 0]
        at = at[torch.argsort(flat[at], stable=True)]
        return Grouping(at // local_ids.shape[1], at, torch.bincount(flat[at], minlength=num_local).tolist())

    def weights_of(self, weights):
        return weights.flatten()[self.at]

    def weights_back(self, grad_row_weights, like):
        return torch.zeros(like.numel(), dtype=like.dtype, device=like.device).index_add_(0, self.at, grad_row_weights.to(like.dtype)).view(like.shape)


class Single:
    """All experts are here: a permutation."""

    def __init__(self, world, placement, device):
        self._num_local = len(placement.local_experts(0))
        self._local = LocalExperts(placement, device)

    def dispatch(self, x, ids, weights):
        grouping = Grouping.of(self._local.of(0, 0, ids), self._num_local)
        return x[grouping.token], grouping.weights_of(weights), grouping.counts, (grouping, x.shape[0], weights)

    def dispatch_backward(self, saved, grad_rows, grad_row_weights):
        grouping, tokens, weights = saved
        return sum_rows(grad_rows, grouping.token, tokens), grouping.weights_back(grad_row_weights, weights)

    def combine(self, saved, rows):
        grouping, tokens, _ = saved
        return sum_rows(rows, grouping.token, tokens)

    def combine_backward(self, saved, grad_sums):
        return grad_sums[saved[0].token]


class AllGather:
    """Every rank gets all tokens and keeps those of its experts; sums are scattered back."""

    def __init__(self, world, placement, device, timeout_ms):
        self._world, self._placement = world, placement
        self._collectives = Collectives(world, device=torch.device(device).type, timeout_ms=timeout_ms)
        self._local = LocalExperts(placement, device)

    def dispatch(self, x, ids, weights):
        counts = [int.from_bytes(n, "little") for n in self._world.all_gather(x.shape[0].to_bytes(8, "little"))]
        gather = self._collectives.all_gather_v
        all_x, all_ids, all_weights = (gather(one.contiguous(), counts) for one in (x, ids.long(), weights))
        rank = self._world.rank
        local = [self._local.of(rank, source, part) for source, part in enumerate(all_ids.split(counts))]
        grouping = Grouping.of(torch.cat(local), len(self._placement.local_experts(rank)))
        return all_x[grouping.token], grouping.weights_of(all_weights), grouping.counts, (grouping, counts, all_weights)

    def dispatch_backward(self, saved, grad_rows, grad_row_weights):
        grouping, counts, all_weights = saved
        scatter = self._collectives.reduce_scatter_v
        return (scatter(sum_rows(grad_rows, grouping.token, sum(counts)), counts),
                scatter(grouping.weights_back(grad_row_weights, all_weights), counts))

    def combine(self, saved, rows):
        grouping, counts, _ = saved
        return self._collectives.reduce_scatter_v(sum_rows(rows, grouping.token, sum(counts)), counts)

    def combine_backward(self, saved, grad_sums):
        grouping, counts, _ = saved
        return self._collectives.all_gather_v(grad_sums.contiguous(), counts)[grouping.token]


@dataclass
class _Routes:
    """What all-to-all-v remembers: sent[i] is the token of this rank in the i-th row sent; counts per rank both ways."""

    grouping: Grouping
    sent: torch.Tensor
    send_counts: list[int]
    receive_counts: list[int]
    received_weights: torch.Tensor
    weights: torch.Tensor


class AllToAll:
    """Every rank sends a token once to each rank that needs it."""

    def __init__(self, world, placement, device, timeout_ms):
        self._world, self._placement = world, placement
        self._collectives = Collectives(world, device=torch.device(device).type, timeout_ms=timeout_ms)
        self._local = LocalExperts(placement, device)

    def _forth(self, routes, x):
        return self._collectives.all_to_all_v(x.contiguous(), routes.send_counts, routes.receive_counts)

    def _back(self, routes, x):
        return self._collectives.all_to_all_v(x.contiguous(), routes.receive_counts, routes.send_counts)

    def dispatch(self, x, ids, weights):
        rank, ranks = self._world.rank, self._world.size
        local = [self._local.of(to, rank, ids) for to in range(ranks)]
        tokens = [(choice >= 0).any(1).nonzero()[:, 0] for choice in local]
        send_counts = [len(part) for part in tokens]
        told = self._world.all_gather(numpy.array(send_counts, "<i8").tobytes())
        receive_counts = [int(numpy.frombuffer(counts, "<i8")[rank]) for counts in told]
        sent = torch.cat(tokens)
        routes = _Routes(None, sent, send_counts, receive_counts, None, weights)
        # a choice says its local expert at the destination
        received_ids = self._forth(routes, torch.cat([choice[part] for choice, part in zip(local, tokens)]))
        routes.grouping = Grouping.of(received_ids, len(self._placement.local_experts(rank)))
        routes.received_weights = self._forth(routes, weights[sent])
        rows = self._forth(routes, x[sent])[routes.grouping.token]
        return rows, routes.grouping.weights_of(routes.received_weights), routes.grouping.counts, routes

    def dispatch_backward(self, saved, grad_rows, grad_row_weights):
        grad_x = self.combine(saved, grad_rows)
        back = self._back(saved, saved.grouping.weights_back(grad_row_weights, saved.received_weights))
        return grad_x, torch.zeros_like(saved.weights).index_add_(0, saved.sent, back)

    def combine(self, saved, rows):
        partials = sum_rows(rows, saved.grouping.token, sum(saved.receive_counts))
        return sum_rows(self._back(saved, partials), saved.sent, saved.weights.shape[0])

    def combine_backward(self, saved, grad_sums):
        return self._forth(saved, grad_sums[saved.sent])[saved.grouping.token]


class Direct:
    """The exchange of this library: rows go once, straight to their final place."""

    def __init__(self, exchange: Exchange, placement: Any):
        self.exchange, self._placement = exchange, placement

    def dispatch(self, x, ids, weights):
        received = self.exchange.dispatch(x, ids, weights, layout="expert_major", placement=self._placement, copy_out=True)
        return received.rows, received.row_weights.clone(), received.expert_counts.tolist(), received.handle

    def dispatch_backward(self, saved, grad_rows, grad_row_weights):
        return self.exchange.dispatch_backward(saved, grad_rows.contiguous(), grad_row_weights.contiguous())

    def combine(self, saved, rows):
        return self.exchange.combine(rows.contiguous(), saved)

    def combine_backward(self, saved, grad_sums):
        return self.exchange.dispatch(grad_sums.contiguous(), handle=saved, layout="expert_major", copy_out=True).rows
