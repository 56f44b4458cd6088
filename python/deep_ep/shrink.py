"""enable_shrink: low-latency calls go on without ranks that are lost or silent. Every call then ends with a meeting of the ranks on the
host, so that all of them have its result or none has, and those that are left make it again without the others."""
import torch

from tokenyard import TransportError, UsageError

from .room import is_capturing

LOST = ("timeout", "peer_lost")  # kinds of failure that leave somebody out; others are the caller's to mend


class Shrink:
    def __init__(self, room):
        self._room = room

    def run(self, attempt) -> None:
        """attempt(), again with fewer ranks for as long as some do not answer. Collective over those that are left."""
        while True:
            try:
                attempt()
                self._settle()
                return
            except TransportError as error:
                if error.kind not in LOST:
                    raise
                before = len(self._room.ranks)
                self._room.shrink()
                if len(self._room.ranks) == before:
                    raise  # all are there: trying again would not end

    def _settle(self):
        exchange = self._room.exchange
        if exchange is not None and exchange.device == "cuda":
            if is_capturing(torch.device("cuda")):
                raise UsageError("a graph is being captured, and enable_shrink has the host see every call; capture with a buffer made without it")
            torch.cuda.current_stream().synchronize()
            exchange.check()
        self._room.world.barrier()

    def mask(self, size) -> list[int]:
        return [int(rank not in self._room.ranks) for rank in range(size)]

    def update(self, rank, mask, own, size) -> None:
        if not 0 <= rank < size or rank == own:
            raise UsageError(f"rank_to_mask = {rank} on rank {own} of {size}; expected one of the other ranks")
        is_masked = rank not in self._room.ranks
        if is_masked and not mask:
            raise UsageError(f"rank {rank} is masked and has left this buffer's memory; low_latency_clean_mask_buffer() on all ranks, this one "
                             "too, takes everybody back")
        if mask and not is_masked:
            self._room.shrink()
            if rank in self._room.ranks:
                raise UsageError(f"rank_to_mask = {rank}, but that rank took part in masking; it is not to make this call")


def same_rows_without(room, rows, topk_idx, handle):
    """(rows, exchange handle) of an earlier dispatch without what the masked ranks sent: its routing travels again."""
    source, ranges, num_max, _, num_experts = handle
    local, slots = source.shape
    nothing = torch.zeros(topk_idx.shape[0], 16, dtype=torch.uint8, device=topk_idx.device)
    exchange = room.exchange_for(topk_idx.device)
    received = exchange.dispatch(nothing, topk_idx, placement=room.placement(num_experts), layout="expert_padded", expert_capacity=slots, copy_out=True)
    left = ranges[:, room.ranks, None]
    begin, count, slot = left >> 32, left & 0xFFFFFFFF, torch.arange(slots, device=ranges.device)
    kept = ((slot >= begin) & (slot < begin + count)).any(1)
    order = (~kept).int().argsort(dim=1, stable=True)  # those that stay, in their order, close up
    return rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2])), received.handle
