"""The low-latency half of Buffer: fixed slots, one step, two results alive."""
import torch

from tokenyard import UsageError

from .events import EventOverlap
from .room import Room, is_capturing, refuse
from .shrink import Shrink, same_rows_without


class LowLatencyHandle(tuple):
    """DeepEP's (src_info, layout_range, M, H, E), with the exchange's handle and the number of the exchange that made it."""

    exchange_handle = None
    generation = 0


class Waits:
    """A tensor [R] of the caller to which a call adds how long it waits for each rank; None: it does not ask."""

    def __init__(self, room, stats):
        self._room, self._stats, self._left = room, stats, None

    def of_call(self):
        """What the exchange adds to: one number for each rank that is left."""
        if self._stats is None or self._room.is_whole:
            return self._stats
        self._left = self._stats.new_zeros(len(self._room.ranks))
        return self._left

    def tell(self) -> None:
        if self._left is not None:
            self._stats[self._room.ranks] += self._left


class LowLatency:
    def _init_low_latency(self):
        self._low_latency_room = Room(self.world, mode="latency")
        self._shrink = Shrink(self._low_latency_room) if self.enable_shrink else None
        self._combine_buffers = {}  # by shape: graphs read them for as long as the buffer lives
        self._combine_buffer = None

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts) -> int:
        """What a caller may pass as num_rdma_bytes; memory is allocated by need."""
        return 2 * num_experts * num_max_dispatch_tokens_per_rank * hidden * 2

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts) -> None:
        """Nothing has to be cleaned: slots carry the number of their call. With enable_shrink the ranks meet, and who does not come is masked."""
        if self._shrink is not None:
            self._shrink.run(lambda: None)

    def _exchange_for(self, x, topk_idx, num_max, num_experts):
        if num_experts % self.group_size:
            raise UsageError(f"num_experts = {num_experts} on {self.group_size} ranks; expected a multiple")
        return self._low_latency_room.exchange_for(
            x.device, max_tokens_per_rank=num_max, max_row_bytes=2 * x.shape[-1], max_scale_bytes=4 * (-(-x.shape[-1] // 128)),
            top_k=topk_idx.shape[1], max_local_experts=num_experts // self.group_size)

    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, cumulative_local_expert_recv_stats=None,
                             dispatch_wait_recv_cost_stats=None, use_fp8=True, round_scale=False, use_ue8m0=False, async_finish=False,
                             return_recv_hook=False):
        """(recv_x [L,R*M,H] or (fp8, scales), recv_count [L], handle, event, hook). dispatch_wait_recv_cost_stats [R] int64: the nanoseconds
        that this rank has to wait for each rank are added."""
        if async_finish and return_recv_hook:
            raise UsageError("async_finish and return_recv_hook: choose one")
        if use_ue8m0 and not round_scale:
            raise UsageError("use_ue8m0 without round_scale; exponents have only powers of two: pass round_scale=True")
        scale_format = None if not use_fp8 else "ue8m0" if use_ue8m0 else "float32_pow2" if round_scale else "float32"
        results = _Results(self, x, num_max_dispatch_tokens_per_rank, num_experts, scale_format)
        waits = Waits(self._low_latency_room, dispatch_wait_recv_cost_stats)

        def start(name):
            exchange = self._exchange_for(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts)
            placement = self._low_latency_room.placement(num_experts)
            if x.shape[0] > num_max_dispatch_tokens_per_rank:
                refuse(exchange, f"{x.shape[0]} tokens; num_max_dispatch_tokens_per_rank is {num_max_dispatch_tokens_per_rank}")
            return getattr(exchange, name)(x, topk_idx, placement=placement, layout="expert_padded", expert_capacity=results.slots,
                                           quantise=scale_format, copy_out=True, out_rows=results.flat_rows, out_scales=results.flat_scales,
                                           waits=waits.of_call())

        def fill(received):
            results.fill(received, self._low_latency_room)

        def count():
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(results.counts)
            waits.tell()

        event, hook = self._go("dispatch", start, fill, count, async_finish, return_recv_hook, (x, topk_idx, dispatch_wait_recv_cost_stats))
        return results.shown(), results.counts, results.handle, event, hook

    def _go(self, name, start, fill, at_end, async_finish, return_recv_hook, reads):
        """Runs a call now, or starts it and leaves its end to the hook: (event, hook). at_end: what is done once, however often it was tried."""
        if self._shrink is not None:
            def task():
                self._shrink.run(lambda: fill(start(name)))
                at_end()

            if return_recv_hook:  # a rank that is masked now has to be left out from the start
                return EventOverlap(None), task
        else:
            def task():
                fill(start(name))
                at_end()

            if return_recv_hook:
                pending = start(f"start_{name}")
                return EventOverlap(None), lambda: (fill(pending.finish()), at_end())[1]
        _, event = self._lane.run(task, asynchronous=async_finish, like=reads[0], reads=reads)
        return event, None

    def low_latency_combine(self, x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False, async_finish=False,
                            return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None):
        """(weighted sums [T,H], event, hook). use_logfmt is a hint: rows travel in their own dtype. combine_wait_recv_cost_stats as for dispatch."""
        if async_finish and return_recv_hook:
            raise UsageError("async_finish and return_recv_hook: choose one")
        if zero_copy and use_logfmt:
            raise UsageError("zero_copy and use_logfmt: choose one")
        if not isinstance(handle, LowLatencyHandle):
            raise UsageError("the handle is not the one that low_latency_dispatch returned")
        if zero_copy and self._combine_buffer is None:
            raise UsageError("zero_copy without rows; get_next_low_latency_combine_buffer(handle) is the memory for them")
        rows = self._combine_buffer if zero_copy else x
        waits = Waits(self._low_latency_room, combine_wait_recv_cost_stats)
        sums = torch.empty((topk_idx.shape[0], rows.shape[-1]), dtype=rows.dtype, device=rows.device) if out is None else out

        def start(name):
            room, y, made = self._low_latency_room, rows, handle.exchange_handle
            if handle.generation != room.generation and self._shrink is not None:
                y, made = same_rows_without(room, rows, topk_idx, handle)
            return getattr(room.exchange, name)(y.contiguous(), made, weighting="at_source", source_weights=topk_weights, out=sums,
                                                waits=waits.of_call())

        reads = rows, topk_weights, sums, combine_wait_recv_cost_stats
        event, hook = self._go("combine", start, lambda result: None, waits.tell, async_finish, return_recv_hook, reads)
        return sums, event, hook

    def get_next_low_latency_combine_buffer(self, handle):
        """[L,R*M,H] bfloat16 that low_latency_combine(zero_copy=True) reads."""
        shape = (handle[0].shape[0], handle[0].shape[1], handle[3])
        if shape not in self._combine_buffers:
            if is_capturing(handle[0].device):
                raise UsageError(f"a graph is being captured, and this is the first buffer of shape {list(shape)}; ask for it once before the capture")
            self._combine_buffers[shape] = torch.empty(shape, dtype=torch.bfloat16, device=handle[0].device)
        self._combine_buffer = self._combine_buffers[shape]
        return self._combine_buffer

    def _shrinking(self):
        if self._shrink is None:
            raise UsageError("masks of ranks need a buffer made with enable_shrink=True; this one was made without")
        return self._shrink

    def low_latency_update_mask_buffer(self, rank_to_mask, mask=False):
        """Collective over the ranks that stay, unlike DeepEP's: they go on without rank_to_mask."""
        self._shrinking().update(rank_to_mask, mask, self.rank, self.group_size)

    def low_latency_query_mask_buffer(self, mask_status):
        """Fills mask_status [R] int32: 1 for the ranks that calls go on without."""
        mask_status.copy_(torch.tensor(self._shrinking().mask(self.group_size), dtype=mask_status.dtype))

    def low_latency_clean_mask_buffer(self):
        """Collective over all ranks of the group, unlike DeepEP's: they meet anew, and none is masked. Earlier handles end."""
        self._shrinking()
        self._meet()


class _Results:
    """Tensors that are there before their contents are."""

    def __init__(self, buffer, x, num_max, num_experts, scale_format):
        hidden, device = x.shape[1], x.device
        local, self.slots = num_experts // buffer.group_size, buffer.group_size * num_max
        dtype = x.dtype if scale_format is None else torch.float8_e4m3fn
        self.rows = torch.empty((local, self.slots, hidden), dtype=dtype, device=device)
        self.flat_rows = self.rows.view(-1, hidden)
        self.flat_scales = self.scales = None
        if scale_format is not None:
            columns = -(-hidden // 128) if scale_format != "ue8m0" else -(-hidden // 512)
            self.flat_scales = torch.empty((local * self.slots, columns), dtype=torch.int32 if scale_format == "ue8m0" else torch.float32, device=device)
            self.scales = torch.empty((local, columns, self.slots), dtype=self.flat_scales.dtype, device=device).transpose(1, 2)
        self.counts = torch.empty(local, dtype=torch.int32, device=device)
        source = torch.empty((local, self.slots), dtype=torch.int32, device=device)
        self.halves = torch.empty((local, buffer.group_size, 2), dtype=torch.int32, device=device)  # of begin << 32 | count, as memory has them
        ranges = self.halves.view(torch.int64).squeeze(2)
        self.handle = LowLatencyHandle((source, ranges, num_max, hidden, num_experts))

    def fill(self, received, room):
        if self.scales is not None:
            self.scales.copy_(self.flat_scales.view(self.scales.shape))
        self.counts.copy_(received.expert_counts)
        self.handle[0].copy_(received.source_token)
        if room.is_whole:
            self.halves.copy_(received.ranges.flip(2))
        else:
            self.halves.zero_()[:, room.ranks] = received.ranges.flip(2)
        self.handle.exchange_handle, self.handle.generation = received.handle, room.generation

    def shown(self):
        return self.rows if self.scales is None else (self.rows, self.scales)
