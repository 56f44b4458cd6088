"""DeepEP's Buffer: dispatch and combine of large batches. Low latency is in low_latency.py."""
from functools import partial

import numpy as np
import torch

from tokenyard import UsageError

from .config import Config
from .events import EventHandle, EventOverlap, Lane, uses_cuda
from .groups import world_of
from .handles import Handles, Known, parts_of
from .low_latency import LowLatency
from .room import Room, fitted, padded_columns, refuse, rows_and_scales


def known_ids(topk_idx, num_experts):
    """int64, num_experts for what is no expert. Ids that are too large the dispatch reports; as an index they would end a CUDA context."""
    return torch.where((topk_idx < 0) | (topk_idx >= num_experts), num_experts, topk_idx.long())


def owners(topk_idx, num_experts, ranks):
    """[T,K] int64: the rank of each choice, `ranks` for none."""
    return known_ids(topk_idx, num_experts) // max(1, num_experts // ranks)


def align(value, multiple):
    return (value + multiple - 1) // multiple * multiple


class Buffer(LowLatency):
    """As DeepEP's. num_nvl_bytes, num_rdma_bytes, num_qps_per_rank and Config change nothing: memory is made by need."""

    num_sms: int = 20

    def __init__(self, group=None, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24,
                 allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False, enable_shrink=False, comm=None, *,
                 use_fabric=False):
        self.group, self._comm = group, comm
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.explicitly_destroy, self.enable_shrink = low_latency_mode, explicitly_destroy, enable_shrink
        self._lane = Lane()
        self._handles = Handles()
        self._meet()
        self.group_size, self.rank = self.world.size, self.world.rank

    def _meet(self):
        """Collective: the world, and nothing allocated yet."""
        self.world = world_of(self.group, self._comm)
        self._room = Room(self.world)
        self._handles.clear()
        self._init_low_latency()

    def __del__(self):
        # Before the world: when the interpreter ends, the rank that holds the store waits there for all that is left of it.
        for name in ("_handles", "_waits", "_shrink", "_room", "_low_latency_room"):
            self.__dict__.pop(name, None)

    def destroy(self) -> None:
        if not self.explicitly_destroy:
            raise UsageError("destroy() of a buffer made without explicitly_destroy=True; it goes with its last reference")
        self._handles.clear()
        self._room = self._low_latency_room = self._waits = self._shrink = self.world = None

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
        owner = owners(topk_idx, num_experts, self.group_size)
        found = torch.zeros(topk_idx.shape[0], self.group_size + 1, dtype=torch.bool, device=topk_idx.device)
        return found.scatter_(1, owner, True)[:, :self.group_size]

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        """(tokens per rank, tokens per group of 8 ranks or None, tokens per expert, whether a token goes to a rank, event)."""
        def task():
            in_rank = self._in_rank(topk_idx, num_experts)
            chosen = known_ids(topk_idx, num_experts).flatten()
            per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx.device)
            per_expert = per_expert.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))[:num_experts].contiguous()
            nodes = None
            if self.group_size > 8:
                padded = torch.nn.functional.pad(in_rank, (0, -self.group_size % 8))
                nodes = padded.view(len(padded), -1, 8).any(2).sum(0, dtype=torch.int32)
            return in_rank.sum(0, dtype=torch.int32), nodes, per_expert, in_rank

        result, event = self._lane.run(task, previous_event=previous_event, asynchronous=async_finish, like=topk_idx)
        return *result, event

    def _reject(self, reason):
        """Tells the peers, who are in the same call, and raises."""
        self.world.all_gather(b"!" + reason.encode())
        raise UsageError(reason)

    def _agree(self, device, tokens, row_bytes, scale_bytes, top_k, num_experts, counts):
        """Counts [R,R+...] of all ranks, and an exchange with room for the largest of them."""
        mine = np.concatenate([np.array([tokens, row_bytes, scale_bytes, top_k, num_experts], "<i8"), np.asarray(counts, "<i8")])
        told = self.world.all_gather(b" " + mine.tobytes())
        for rank, one in enumerate(told):
            if one[:1] == b"!":
                raise UsageError(f"rank {rank} rejected this call: {one[1:].decode()}")
        told = [np.frombuffer(one[1:], "<i8") for one in told]
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
        exchange, told = self._agree(x.device, x.shape[0], *_bytes_of(x, scales, ids), num_experts, counts)
        received = exchange.dispatch(x, ids, weights, scales=scales, placement=self._room.placement(num_experts), copy_out=True)
        return received, told[:, :self.group_size], told[:, self.group_size:].sum(0)

    def _known_of(self, handle):
        """The dispatch that a tuple stands for. When only its tensors are left, their routing travels again."""
        serials, in_rank, _ = parts_of(handle)
        known = self._handles.find(serials, self._room.generation)
        if known is not None:
            return known
        rows = torch.zeros(in_rank.shape[0], 16, dtype=torch.uint8, device=in_rank.device)
        received, _, _ = self._route(rows, None, self._rank_ids(in_rank), None, self.group_size, in_rank, None)
        return Known(self._room.generation, received.handle, received.handle.num_rows)

    def _rank_ids(self, in_rank):
        """Routing of whole ranks: one expert for each."""
        return torch.where(in_rank, torch.arange(self.group_size, device=in_rank.device), -1)

    def _tuple_of(self, received, rows, counts, in_rank, config):
        """DeepEP's handle. rows: how many the caller knows of; counts [R,R] of tokens from each rank to each, maybe of this rank alone."""
        channels = max(1, (config.num_sms if config else Buffer.num_sms) // 2)
        known = Known(self._room.generation, received.handle, received.rows.shape[0])
        source = fitted(received.source_token, rows, -1)
        if self.group_size <= 8:
            serials = self._handles.remember(known, (self.group_size, channels), in_rank.device)
            return counts.cumsum(0, dtype=torch.int32), serials, torch.zeros_like(serials), source.clone(), in_rank, _heads(in_rank, self.group_size)
        nodes = -(-self.group_size // 8)
        serials = self._handles.remember(known, (nodes, channels), in_rank.device)
        ends = received.rank_counts.cumsum(0, dtype=torch.int32)
        per_channel = serials.new_zeros(self.group_size, channels)
        meta = torch.stack((fitted(received.source_rank, rows, -1) // 8, source), 1).view(torch.uint8)
        return (in_rank, serials, per_channel, torch.zeros_like(serials), torch.cat((ends[7:-1:8], ends[-1:])), per_channel.clone(), ends, meta,
                _heads(in_rank, nodes), _heads(meta, 8))

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
            task = partial(self._dispatch_worst, rows, scales, is_token_in_rank, num_tokens_per_expert.shape[0], topk_idx, topk_weights,
                           num_worst_tokens, config) if num_worst_tokens else partial(
                               self._dispatch, rows, scales, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights, expert_alignment, config)
        result, event = self._lane.run(task, previous_event=previous_event, asynchronous=async_finish, like=rows,
                                       reads=(rows, scales, topk_idx, topk_weights, is_token_in_rank))
        return *result, event

    def _contradiction(self, in_rank, topk_idx, num_experts):
        """What is_token_in_rank and topk_idx disagree about, or None. Waits for the device."""
        if in_rank.shape != (topk_idx.shape[0], self.group_size):
            return f"is_token_in_rank is {list(in_rank.shape)}, topk_idx {list(topk_idx.shape)}; expected a row of {self.group_size} for each token"
        differs = (self._in_rank(topk_idx, num_experts) != in_rank).any(1).nonzero()
        if not len(differs):
            return None
        token = int(differs[0, 0])
        return f"is_token_in_rank[{token}] = {in_rank[token].tolist()} but topk_idx[{token}] = {topk_idx[token].tolist()} of {num_experts} experts"

    def _dispatch(self, x, scales, in_rank, per_expert, topk_idx, topk_weights, alignment, config):
        num_experts = per_expert.shape[0]
        if topk_idx is None:
            received, counts, totals = self._route(x, scales, self._rank_ids(in_rank), None, self.group_size, in_rank, per_expert)
            window = num_experts // self.group_size
            local_counts = totals[self.rank * window:(self.rank + 1) * window].tolist()
            ids = weights = None
        else:
            if reason := self._contradiction(in_rank, topk_idx, num_experts):
                self._reject(reason)
            received, counts, _ = self._route(x, scales, topk_idx, topk_weights, num_experts, in_rank, None)
            local_counts = received.expert_counts.tolist()
            ids, weights = _choices(received, topk_idx, topk_weights)
        recv_x = received.rows
        made = self._tuple_of(received, recv_x.shape[0], torch.as_tensor(counts).to(in_rank.device), in_rank, config)
        return _payload(recv_x, received.scales), ids, weights, [align(count, alignment) for count in local_counts], made

    def _dispatch_worst(self, x, scales, in_rank, num_experts, topk_idx, topk_weights, num_worst_tokens, config):
        """Nothing here waits for the device or asks other ranks, so that a CUDA graph may hold it."""
        tokens = num_worst_tokens // self.group_size
        if num_experts % self.group_size:
            raise UsageError(f"num_experts = {num_experts} on {self.group_size} ranks; DeepEP's layout needs a multiple")
        row_bytes, scale_bytes, top_k = _bytes_of(x, scales, topk_idx)
        exchange = self._room.exchange_for(x.device, max_tokens_per_rank=tokens, max_row_bytes=row_bytes, max_scale_bytes=scale_bytes, top_k=top_k,
                                           max_local_experts=num_experts // self.group_size)
        placement = self._room.placement(num_experts)
        if x.shape[0] > tokens:
            refuse(exchange, f"num_worst_tokens = {num_worst_tokens} for {self.group_size} ranks leaves {tokens} tokens to each, and this rank has "
                             f"{x.shape[0]}; give ranks x the most tokens of a rank")
        if x.is_cpu and (reason := self._contradiction(in_rank, topk_idx, num_experts)):  # on a GPU somebody would have to wait for it
            refuse(exchange, reason)
        received = exchange.dispatch(x, topk_idx, topk_weights, scales=scales, placement=placement, sizing="capacity", copy_out=True)
        rows = received.rows
        counts = torch.zeros(self.group_size, self.group_size, dtype=torch.int32, device=x.device)
        counts[:, self.rank] = received.rank_counts  # what other ranks get is not known here
        made = self._tuple_of(received, num_worst_tokens, counts, in_rank, config)
        ids, weights = _choices(received, topk_idx, topk_weights)
        recv_x = _payload(fitted(rows, num_worst_tokens), fitted(received.scales, num_worst_tokens))
        return recv_x, fitted(ids, num_worst_tokens, -1), fitted(weights, num_worst_tokens, 0), [], made

    def _dispatch_cached(self, x, scales, handle):
        known = self._known_of(handle)
        received = self._room.exchange_for(x.device).dispatch(x, handle=known.handle, scales=scales, copy_out=True)
        rows = parts_of(handle)[2]
        return _payload(fitted(received.rows, rows), fitted(received.scales, rows)), None, None, None, None

    def combine(self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        """(sums [T,H], sums of topk_weights [T,K] or None, event): float32, biases first, ranks ascending; weights element by element."""
        def task():
            known = self._known_of(handle)
            exchange = self._room.exchange_for(x.device)
            for name, one in ("x", x), ("topk_weights", topk_weights):
                if one is not None and one.shape[0] != (rows := parts_of(handle)[2]):
                    refuse(exchange, f"{name} is {list(one.shape)}; expected {rows} rows, as the dispatch of this handle gave")
            sums = exchange.combine(fitted(x, known.rows).contiguous(), known.handle, bias=bias)
            if topk_weights is None:
                return sums, None
            weights = exchange.combine(padded_columns(fitted(topk_weights, known.rows)), known.handle)
            return sums, weights[:, :topk_weights.shape[1]].contiguous()

        result, event = self._lane.run(task, previous_event=previous_event, asynchronous=async_finish, like=x, reads=(x, topk_weights, bias))
        return *result, event

    def get_local_buffer_tensor(self, dtype, size=None, offset=0, use_rdma_buffer=False):
        """Memory of the size that the caller asked for at construction, for callers that look into it; no call uses it."""
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        memory = torch.zeros(max(0, num_bytes - offset), dtype=torch.uint8, device="cuda" if uses_cuda() else "cpu")
        flat = memory[:memory.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if size is not None and size.numel() > flat.numel():
            raise UsageError(f"{size.numel() * dtype.itemsize} bytes at offset {offset}, num_{'rdma' if use_rdma_buffer else 'nvl'}_bytes = {num_bytes}; "
                             "expected no more")
        return flat if size is None else flat[:size.numel()].view(size)


def _heads(like, columns):
    """What a handle of DeepEP has for each token or row, and this exchange does not need."""
    return torch.zeros(like.shape[0], columns, dtype=torch.int32, device=like.device)


def _payload(rows, scales):
    return rows if scales is None else (rows, scales)


def _bytes_of(x, scales, ids):
    """(bytes of a row either way, of its scales, top-k): fp8 goes, bfloat16 comes back, and so do weights."""
    row_bytes = max(x.shape[1] * max(x.element_size(), 2), 4 * align(ids.shape[1], 4))
    return row_bytes, 0 if scales is None else scales.shape[1] * scales.element_size(), ids.shape[1]


def _choices(received, topk_idx, topk_weights):
    """(local experts, -1 elsewhere, in the dtype of topk_idx; their weights, 0 elsewhere)."""
    ids = received.local_ids.to(topk_idx.dtype)
    return ids, None if topk_weights is None else torch.where(ids >= 0, received.row_weights, 0)
