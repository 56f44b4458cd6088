"""DeepEP's Buffer: dispatch and combine of large batches. Low latency is in low_latency.py."""
import itertools
from collections import OrderedDict

import numpy as np
import torch

from tokenyard import UsageError

from .config import Config
from .events import EventHandle, EventOverlap, Lane
from .groups import world_of
from .low_latency import LowLatency
from .room import Room, padded_columns, rows_and_scales, stretched

_serials = itertools.count(1)
KEPT_HANDLES = 256  # of recent dispatches; an older one's routing travels again when it is used


def align(value, multiple):
    return (value + multiple - 1) // multiple * multiple


class Buffer(LowLatency):
    """As DeepEP's. num_nvl_bytes, num_rdma_bytes, num_qps_per_rank and Config change nothing: memory is made by need."""

    num_sms: int = 20

    def __init__(self, group=None, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24,
                 allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False, enable_shrink=False, comm=None, *,
                 use_fabric=False):
        if enable_shrink:
            raise UsageError("enable_shrink = True: ranks cannot be masked in this version; lost ranks raise tokenyard.TransportError")
        self.world = world_of(group, comm, 100_000)
        self.group, self.group_size, self.rank = group, self.world.size, self.world.rank
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.explicitly_destroy, self.enable_shrink = low_latency_mode, explicitly_destroy, enable_shrink
        self._lane = Lane()
        self._room = Room(self.world)
        self._handles = OrderedDict()  # serial -> (generation, Handle)
        self._init_low_latency()

    def destroy(self) -> None:
        if not self.explicitly_destroy:
            raise UsageError("destroy() of a buffer made without explicitly_destroy=True; it goes with its last reference")
        self._handles.clear()
        self._room = self._low_latency_room = self.world = None

    @staticmethod
    def is_sm90_compiled() -> bool:
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    def get_comm_stream(self):
        """The stream of asynchronous calls; None on CPUs."""
        return self._lane.stream

    def _in_rank(self, topk_idx, num_experts):
        """[T,R]: whether a token has an expert on each rank."""
        if num_experts % self.group_size:
            raise UsageError(f"num_experts = {num_experts} on {self.group_size} ranks; DeepEP's layout needs a multiple")
        owner = torch.where(topk_idx < 0, self.group_size, topk_idx.long() // (num_experts // self.group_size))
        found = torch.zeros(topk_idx.shape[0], self.group_size + 1, dtype=torch.bool, device=topk_idx.device)
        return found.scatter_(1, owner, True)[:, :self.group_size]

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        """(tokens per rank, tokens per group of 8 ranks or None, tokens per expert, whether a token goes to a rank, event)."""
        def task():
            in_rank = self._in_rank(topk_idx, num_experts)
            chosen = topk_idx[topk_idx >= 0]
            per_expert = torch.bincount(chosen, minlength=num_experts).int()
            nodes = None
            if self.group_size > 8:
                nodes = in_rank.view(-1, self.group_size // 8, 8).any(2).sum(0, dtype=torch.int32)
            return in_rank.sum(0, dtype=torch.int32), nodes, per_expert, in_rank

        result, event = self._lane.run(task, previous_event=previous_event, asynchronous=async_finish, like=topk_idx)
        return *result, event

    def _agree(self, device, tokens, row_bytes, scale_bytes, top_k, num_experts, counts):
        """Counts [R,R+...] of all ranks, and an exchange with room for the largest of them."""
        mine = np.concatenate([np.array([tokens, row_bytes, scale_bytes, top_k, num_experts], "<i8"), np.asarray(counts, "<i8")])
        told = [np.frombuffer(one, "<i8") for one in self.world.all_gather(mine.tobytes())]
        largest = np.max([one[:5] for one in told], 0)
        for rank, one in enumerate(told):
            if one[4] != num_experts or len(one) != len(mine):
                raise UsageError(f"rank {rank} dispatches over {one[4]} experts, this rank over {num_experts}; expected the same")
        exchange = self._room.exchange_for(
            device, max_tokens_per_rank=1 << int(max(largest[0], 1) - 1).bit_length(), max_row_bytes=int(largest[1]),
            max_scale_bytes=int(largest[2]), top_k=int(largest[3]), max_local_experts=int(-(-max(num_experts, 1) // self.group_size)))
        return exchange, np.array([one[5:] for one in told])

    def _route(self, x, scales, ids, weights, num_experts, in_rank, per_expert):
        """One new dispatch: (Received, counts [src][dst], tokens per local expert of all ranks' per_expert)."""
        counts = in_rank.sum(0).tolist() + ([] if per_expert is None else per_expert.tolist())
        row_bytes = x.shape[1] * max(x.element_size(), 2)  # fp8 in, bfloat16 back
        scale_bytes = 0 if scales is None else scales.shape[1] * scales.element_size()
        exchange, told = self._agree(x.device, x.shape[0], max(row_bytes, 4 * align(ids.shape[1], 4)), scale_bytes, ids.shape[1], num_experts, counts)
        received = exchange.dispatch(x, ids, weights, scales=scales, placement=self._room.placement(num_experts))
        return received, told[:, :self.group_size], told[:, self.group_size:].sum(0)

    def _remember(self, received):
        """The number under which a handle is found again; it travels in the second tensor of the tuple."""
        serial = next(_serials)
        self._handles[serial] = (self._room.generation, received.handle)
        while len(self._handles) > KEPT_HANDLES:
            self._handles.popitem(last=False)
        return serial

    def _handle_of(self, handle):
        """The exchange's handle for a tuple whose tensors are all that is left of a dispatch."""
        _, serials, _, source, in_rank, _ = handle
        generation, known = self._handles.get(int(serials[0, 0]), (0, None))
        if known is not None and generation == self._room.generation and known.num_rows == source.shape[0]:
            return known
        rows = torch.zeros(in_rank.shape[0], 16, dtype=torch.uint8, device=in_rank.device)
        received, _, _ = self._route(rows, None, self._rank_ids(in_rank), None, self.group_size, in_rank, None)
        return received.handle

    def _rank_ids(self, in_rank):
        """Routing of whole ranks: one expert for each."""
        return torch.where(in_rank, torch.arange(self.group_size, device=in_rank.device), -1)

    def _tuple_of(self, received, counts, in_rank, config):
        channels = max(1, (config.num_sms if config else Buffer.num_sms) // 2)
        device = in_rank.device
        prefix = torch.as_tensor(np.cumsum(counts, 0), dtype=torch.int32).to(device)
        serials = torch.full((self.group_size, channels), self._remember(received), dtype=torch.int32, device=device)
        return prefix, serials, torch.zeros_like(serials), received.source_token.clone(), in_rank, torch.zeros_like(in_rank, dtype=torch.int32)

    def dispatch(self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None, num_tokens_per_expert=None,
                 topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0, config=None, previous_event=None, async_finish=False,
                 allocate_on_comm_stream=False):
        """(recv_x, recv_topk_idx, recv_topk_weights, tokens per local expert, handle, event); order (source rank, token)."""
        rows, scales = rows_and_scales(x)
        if handle is not None:
            task = lambda: self._dispatch_cached(rows, scales, handle)  # noqa: E731
        else:
            if is_token_in_rank is None or num_tokens_per_expert is None:
                raise UsageError("dispatch without is_token_in_rank or num_tokens_per_expert; get_dispatch_layout makes both")
            if num_worst_tokens and topk_idx is None:
                raise UsageError(f"num_worst_tokens = {num_worst_tokens} without topk_idx; it needs the top-k")
            task = lambda: self._dispatch(rows, scales, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights, expert_alignment,  # noqa: E731
                                          num_worst_tokens, config)
        result, event = self._lane.run(task, previous_event=previous_event, asynchronous=async_finish, like=rows)
        return *result, event

    def _dispatch(self, x, scales, in_rank, per_expert, topk_idx, topk_weights, alignment, num_worst_tokens, config):
        num_experts = per_expert.shape[0]
        if topk_idx is None:
            received, counts, totals = self._route(x, scales, self._rank_ids(in_rank), None, self.group_size, in_rank, per_expert)
            window = num_experts // self.group_size
            local_counts = totals[self.rank * window:(self.rank + 1) * window].tolist()
            ids = weights = None
        else:
            differs = (self._in_rank(topk_idx, num_experts) != in_rank).any(1).nonzero()
            if len(differs):
                token = int(differs[0, 0])
                raise UsageError(f"is_token_in_rank[{token}] = {in_rank[token].tolist()} but topk_idx[{token}] = {topk_idx[token].tolist()} of {num_experts} experts")
            received, counts, _ = self._route(x, scales, topk_idx, topk_weights, num_experts, in_rank, None)
            local_counts = received.expert_counts.tolist()
            ids = received.local_ids.to(topk_idx.dtype)
            weights = None if topk_weights is None else torch.where(ids >= 0, received.row_weights, 0)
        recv_x = received.rows.clone()
        recv_scales = None if scales is None else received.scales.clone()
        made = self._tuple_of(received, counts, in_rank, config)
        received.release()
        if num_worst_tokens:
            if recv_x.shape[0] > num_worst_tokens:
                raise UsageError(f"{recv_x.shape[0]} rows came, num_worst_tokens is {num_worst_tokens}; use ranks x the most tokens of a rank")
            recv_x, recv_scales = stretched(recv_x, num_worst_tokens), stretched(recv_scales, num_worst_tokens)
            ids, weights, local_counts = stretched(ids, num_worst_tokens, -1), stretched(weights, num_worst_tokens, 0), []
        local_counts = [align(count, alignment) for count in local_counts]
        return recv_x if scales is None else (recv_x, recv_scales), ids, weights, local_counts, made

    def _dispatch_cached(self, x, scales, handle):
        known = self._handle_of(handle)
        received = self._room.exchange.dispatch(x, handle=known, scales=scales)
        result = received.rows.clone() if scales is None else (received.rows.clone(), received.scales.clone())
        return result, None, None, None, None

    def combine(self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        """(sums [T,H], sums of topk_weights [T,K] or None, event): float32, biases first, ranks ascending; weights element by element."""
        def task():
            known = self._handle_of(handle)
            rows = handle[3].shape[0]
            sums = self._room.exchange.combine(x[:rows].contiguous(), known, bias=bias)
            if topk_weights is None:
                return sums, None
            weights = self._room.exchange.combine(padded_columns(topk_weights[:rows]), known)
            return sums, weights[:, :topk_weights.shape[1]].contiguous()

        result, event = self._lane.run(task, previous_event=previous_event, asynchronous=async_finish, like=x)
        return *result, event

    def get_local_buffer_tensor(self, dtype, size=None, offset=0, use_rdma_buffer=False):
        """Memory of the size that the caller asked for at construction, for callers that look into it; no call uses it."""
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        memory = torch.zeros(max(0, num_bytes - offset), dtype=torch.uint8)
        flat = memory[:memory.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        return flat if size is None else flat[:size.numel()].view(size)
