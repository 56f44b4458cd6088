"""DeepEP's ElasticBuffer (V2): one buffer for plain and expanded dispatch, with or without the CPU knowing the counts."""
from dataclasses import dataclass
from typing import Any

import torch

from tokenyard import UsageError

from .buffer import align, owners
from .events import EventHandle, Lane
from .groups import world_of
from .room import Room, fitted, is_capturing, padded_columns, refuse, rows_and_scales


@dataclass
class EPHandle:
    """What a dispatch learned. Attributes as DeepEP's; exchange_handle is ours."""

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: torch.Tensor
    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    psum_num_recv_tokens_per_expert: torch.Tensor
    num_unaligned_recv_tokens_per_expert: torch.Tensor
    num_recv_tokens_per_expert_list: list
    recv_src_metadata: torch.Tensor
    dst_buffer_slot_idx: torch.Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    token_metadata_at_forward: Any = None
    channel_linked_list: Any = None
    exchange_handle: Any = None
    recv_topk_idx: Any = None
    source_k: Any = None  # of every expanded row, -1 on padding
    exchange_rows: int = 0  # that combine takes: at least as many as its caller knows of
    room_generation: int = 0


class ElasticBuffer:
    """As DeepEP's. Numbers of SMs and queue pairs, num_bytes and num_cpu_bytes change nothing: memory is made by need. Results are
    always deterministic: rows are sorted by (source rank, token)."""

    def __init__(self, group, num_bytes=None, num_cpu_bytes=0, num_max_tokens_per_rank=0, hidden=0, num_topk=0, use_fp8_dispatch=False,
                 deterministic=False, allow_hybrid_mode=True, allow_multiple_reduction=True, prefer_overlap_with_compute=True, sl_idx=3,
                 num_allocated_qps=0, num_cpu_timeout_secs=300, num_gpu_timeout_secs=100, explicitly_destroy=False):
        timeout_ms = 1000 * (num_gpu_timeout_secs or 100)
        self.world = world_of(group, None, timeout_ms)
        self.group, self.num_ranks, self.rank_idx = group, self.world.size, self.world.rank
        self.num_bytes = num_bytes if num_bytes is not None else self.get_buffer_size_hint(group, num_max_tokens_per_rank, hidden, num_topk)
        self.num_max_tokens_per_rank, self.num_allocated_qps = num_max_tokens_per_rank, num_allocated_qps
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = divmod(self.rank_idx, self.num_scaleup_ranks)
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self.allow_hybrid_mode, self.allow_multiple_reduction = bool(allow_hybrid_mode), bool(allow_multiple_reduction)
        self.prefer_overlap_with_compute, self.deterministic, self.explicitly_destroy = prefer_overlap_with_compute, deterministic, explicitly_destroy
        self._lane = Lane()
        self._room = Room(self.world, unfolded=not allow_multiple_reduction, timeout_ms=timeout_ms)

    @staticmethod
    def get_buffer_size_hint(group, num_max_tokens_per_rank, hidden, num_topk=0, use_fp8_dispatch=False, allow_hybrid_mode=True,
                             allow_multiple_reduction=True) -> int:
        """What a caller may pass as num_bytes; memory is allocated by need."""
        return 2 * group.size() * num_max_tokens_per_rank * hidden * 2

    def get_theoretical_num_sms(self, num_experts, num_topk, num_scaleout_topk=0, rdma_gbs=0, nvlink_gbs=0, sm_read_gbs=200, sm_write_gbs=50) -> int:
        return 24

    def get_theoretical_num_qps(self, num_sms) -> int:
        return num_sms

    def get_logical_domain_size(self) -> tuple[int, int]:
        return 1, self.num_ranks

    def get_physical_domain_size(self) -> tuple[int, int]:
        return 1, self.num_ranks

    def get_comm_stream(self):
        """The stream of asynchronous calls; None on CPUs."""
        return self._lane.stream

    @staticmethod
    def capture() -> EventHandle:
        return EventHandle()

    def barrier(self, use_comm_stream=True, with_cpu_sync=False, sequential=True) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.world.barrier()

    def destroy(self) -> None:
        if not self.explicitly_destroy:
            raise UsageError("destroy() of a buffer made without explicitly_destroy=True; it goes with its last reference")
        self._room = self.world = None

    def dispatch(self, x, topk_idx=None, topk_weights=None, cumulative_local_expert_recv_stats=None, num_experts=None,
                 num_max_tokens_per_rank=None, expert_alignment=None, num_sms=0, num_qps=0, previous_event=None,
                 previous_event_before_epilogue=None, async_with_compute_stream=False, allocate_on_comm_stream=False, handle=None,
                 do_handle_copy=True, do_cpu_sync=None, do_expand=False, do_zero_padding=False, use_tma_aligned_col_major_sf=False):
        """(recv_x, recv_topk_idx or None when expanded, recv_topk_weights or None, handle, event)."""
        rows, scales = rows_and_scales(x)
        if handle is not None and (do_cpu_sync or topk_idx is not None):
            raise UsageError("a cached dispatch (handle) takes no topk_idx and no do_cpu_sync; its counts are known")
        _check_type(handle, optional=True)
        num_max = num_max_tokens_per_rank or self.num_max_tokens_per_rank

        def task():
            made = handle if handle is not None else self._new(rows, scales, topk_idx, topk_weights, num_experts, num_max, expert_alignment or 1,
                                                               bool(do_expand), bool(do_handle_copy), do_cpu_sync is None or bool(do_cpu_sync))
            if handle is None:
                made, received = made
                recv_x, weights = received.rows, received.row_weights.clone() if topk_weights is not None else None
                recv_scales = received.scales
            else:
                received = self._exchange(rows, scales, made).dispatch(rows, handle=made.exchange_handle, scales=scales, copy_out=True)
                recv_x, recv_scales, weights = received.rows, received.scales, self._weights_again(made, topk_weights)
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(made.num_unaligned_recv_tokens_per_expert)
            if made.do_expand and do_zero_padding:
                gaps = made.source_k < 0
                for one in (recv_x.view(torch.uint8), recv_scales, weights):
                    if one is not None:
                        one.masked_fill_(gaps if one.ndim == 1 else gaps[:, None], 0)
            return (*self._shaped(made, recv_x, recv_scales, weights, use_tma_aligned_col_major_sf), made)

        result, event = self._lane.run(task, previous_event=previous_event, before_end=previous_event_before_epilogue,
                                       asynchronous=bool(async_with_compute_stream), like=rows, reads=(rows, scales, topk_idx, topk_weights))
        return *result, event

    def _exchange(self, rows, scales, handle=None, **needs):
        exchange = self._room.exchange_for(
            rows.device, max_row_bytes=max(rows.shape[1] * max(rows.element_size(), 2), 4 * align(needs.get("top_k", 1), 4)),
            max_scale_bytes=0 if scales is None else scales.shape[1] * scales.element_size(), **needs)
        if handle is not None and handle.room_generation != self._room.generation:
            raise UsageError("the handle is of calls with smaller rows; dispatch again without it")
        return exchange

    def _new(self, rows, scales, topk_idx, topk_weights, num_experts, num_max, alignment, expand, copy, cpu_sync):
        """(EPHandle, Received) of a dispatch that routes anew. Without cpu_sync nothing here waits for the device: shapes are bounds."""
        if num_experts is None or num_experts % self.num_ranks:
            raise UsageError(f"num_experts = {num_experts} on {self.num_ranks} ranks; expected a multiple")
        if num_max < 1:
            raise UsageError(f"num_max_tokens_per_rank = {num_max}; expected the most tokens of a rank")
        if cpu_sync and is_capturing(rows.device):
            raise UsageError("do_cpu_sync while a graph is being captured; counts reach the host only when kernels run: pass do_cpu_sync=0")
        exchange = self._exchange(rows, scales, max_tokens_per_rank=num_max, top_k=topk_idx.shape[1], max_local_experts=num_experts // self.num_ranks)
        options = {"layout": "expert_major", "alignment": alignment} if expand else {"layout": "token_major"}
        placement = self._room.placement(num_experts)
        if rows.shape[0] > num_max:
            refuse(exchange, f"{rows.shape[0]} tokens, num_max_tokens_per_rank = {num_max}; expected at most that many")
        received = exchange.dispatch(rows, topk_idx, topk_weights, scales=scales, placement=placement, copy_out=True,
                                     sizing="exact" if cpu_sync else "capacity", **options)
        counts = received.expert_counts.clone()
        aligned = (counts + alignment - 1) // alignment * alignment
        psum = received.expert_offsets[:-1] + counts if expand else aligned.cumsum(0, dtype=torch.int32)
        bound = num_max * self.num_ranks
        metadata, source_k = (_expanded_metadata if expand else _metadata)(received, topk_idx.shape[1], num_max, bound)
        tokens, rows = (received.handle.num_rows, received.rows.shape[0]) if cpu_sync else (bound, self._most_rows(topk_idx, num_experts, num_max, alignment))
        return EPHandle(
            do_expand=expand, num_experts=num_experts, expert_alignment=alignment, num_max_tokens_per_rank=num_max, num_sms=0,
            topk_idx=topk_idx.clone() if copy else topk_idx, psum_num_recv_tokens_per_scaleup_rank=received.rank_counts.cumsum(0).int(),
            psum_num_recv_tokens_per_expert=psum.int(), num_unaligned_recv_tokens_per_expert=counts,
            num_recv_tokens_per_expert_list=aligned.tolist() if cpu_sync else [], recv_src_metadata=fitted(metadata, tokens, -1),
            dst_buffer_slot_idx=self._slots(topk_idx, num_experts), num_recv_tokens=tokens,
            num_expanded_tokens=rows if expand else 0, exchange_handle=received.handle, source_k=source_k, exchange_rows=received.rows.shape[0],
            recv_topk_idx=None if expand else received.local_ids.to(topk_idx.dtype), room_generation=self._room.generation), received

    def _most_rows(self, topk_idx, num_experts, num_max, alignment):
        """Of an expanded dispatch: what DeepEP promises the shape of without CPU sync."""
        local = num_experts // self.num_ranks
        return align(num_max * self.num_ranks * min(topk_idx.shape[1], local) + (alignment - 1) * local, alignment)

    def _slots(self, topk_idx, num_experts):
        """[T,K]: the how-manieth token for its rank each choice belongs to, -1 without one."""
        owner = owners(topk_idx, num_experts, self.num_ranks)
        goes = torch.zeros(topk_idx.shape[0], self.num_ranks + 1, dtype=torch.int64, device=topk_idx.device).scatter_(1, owner, 1)
        slots = (goes.cumsum(0) - 1).gather(1, owner)
        return torch.where(topk_idx < 0, -1, slots).int()

    def _shaped(self, handle, rows, scales, weights, col_major_scales):
        """Results in the shapes that DeepEP promises."""
        count = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
        rows, scales, weights, ids = fitted(rows, count), fitted(scales, count), fitted(weights, count), fitted(handle.recv_topk_idx, count, -1)
        if scales is not None:
            if col_major_scales:
                columns = scales.new_empty(scales.shape[1], align(count, 4)).T[:count]
                scales = columns.copy_(scales)
            rows = (rows, scales)
        return rows, ids, weights

    def _weights_again(self, handle, topk_weights):
        """New weights along a known routing: they travel as rows."""
        if topk_weights is None:
            return None
        exchange = self._room.exchange
        rows = exchange.dispatch(padded_columns(topk_weights), handle=handle.exchange_handle, copy_out=True).rows
        if not handle.do_expand:
            return rows[:, :topk_weights.shape[1]].contiguous()
        return rows.gather(1, handle.source_k.clamp(min=0).long()[:, None])[:, 0]

    def combine(self, x, handle, topk_weights=None, bias=None, num_sms=0, num_qps=0, previous_event=None, previous_event_before_epilogue=None,
                async_with_compute_stream=False, allocate_on_comm_stream=False):
        """(sums [T,H], weights [T,K] or None, event): biases first, then ranks by their last top-k position."""
        _check_type(handle)

        def task():
            _check_rows(self._room.exchange, x, topk_weights, handle)
            fold = not handle.do_expand or self.allow_multiple_reduction
            if topk_weights is not None and not fold:
                raise UsageError("topk_weights of an expanded combine need allow_multiple_reduction=True")
            weights = None if topk_weights is None else fitted(topk_weights, handle.exchange_rows).contiguous()
            result = self._room.exchange.combine(fitted(x, handle.exchange_rows).contiguous(), handle.exchange_handle, order="topk", fold=fold, bias=bias,
                                                 row_weights=weights)
            return (result, None) if weights is None else result

        result, event = self._lane.run(task, previous_event=previous_event, before_end=previous_event_before_epilogue,
                                       asynchronous=bool(async_with_compute_stream), like=x, reads=(x, topk_weights, bias))
        return *result, event


def _check_type(handle, optional=False):
    if not isinstance(handle, EPHandle) and not (optional and handle is None):
        raise UsageError(f"handle is a {type(handle).__name__}; expected the EPHandle that dispatch returned")


def _check_rows(exchange, x, topk_weights, handle):
    """As DeepEP, a plain combine takes as many rows as recv_src_metadata, which callers may cut, and an expanded one what they know to be there."""
    rows = handle.recv_src_metadata.shape[0]
    if handle.do_expand:
        rows = int(handle.psum_num_recv_tokens_per_expert[-1]) if x.is_cpu else sum(handle.num_recv_tokens_per_expert_list)
    if x.shape[0] < rows:
        refuse(exchange, f"x is {list(x.shape)}; expected {rows} rows or more, as the dispatch of this handle gave")
    if topk_weights is not None and topk_weights.shape[0] != x.shape[0]:
        refuse(exchange, f"topk_weights is {list(topk_weights.shape)}, x {list(x.shape)}; expected a row each")


def _metadata(received, top_k, num_max, _):
    """([N,2+K] int32: source rank * M + token, else -1; None)."""
    metadata = torch.full((received.source_rank.shape[0], 2 + top_k), -1, dtype=torch.int32, device=received.source_rank.device)
    metadata[:, 0] = torch.where(received.source_rank < 0, -1, received.source_rank * num_max + received.source_token)
    return metadata, None


def _expanded_metadata(received, top_k, num_max, bound):
    """([R*M,2+K] int32 with a row of each token that is here, in order: source rank * M + token, -1, the rows of its choices or -1;
    source_k of expanded rows). What is nowhere goes to one row more."""
    device, source_k = received.source_k.device, received.source_k.clone()
    source = torch.where(source_k < 0, bound, received.source_rank * num_max + received.source_token).long()
    is_here = torch.zeros(bound + 1, dtype=torch.bool, device=device).scatter_(0, source, True)
    is_here[bound:] = False
    index = torch.where(is_here, is_here.cumsum(0) - 1, bound)
    metadata = torch.full((bound + 1, 2 + top_k), -1, dtype=torch.int32, device=device)
    metadata[index, 0] = torch.arange(bound + 1, dtype=torch.int32, device=device)
    metadata[index[source], 2 + source_k.clamp(min=0).long()] = torch.arange(source.shape[0], dtype=torch.int32, device=device)
    return metadata[:bound], source_k
