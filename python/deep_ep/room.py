"""The exchange behind a buffer: made at the first call, and anew when a call needs more."""
import contextlib

import torch

from tokenyard import Error, Exchange, Placement, UsageError
from tokenyard.world import World

_NEEDS = ("max_tokens_per_rank", "max_row_bytes", "max_scale_bytes", "top_k", "max_local_experts")


def is_capturing(device) -> bool:
    """Whether calls on the current stream become part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Room:
    """Grows by what calls ask for; every rank asks for the same, so that all of them make their exchange anew together."""

    def __init__(self, world: World, **options):
        self.world, self._options = world, options
        self._num_ranks, self.ranks = world.size, list(range(world.size))  # ranks: who is left of them
        self._shape = dict.fromkeys(_NEEDS, 1)
        self._placements = {}
        self._captured = []  # exchanges that graphs use: they stay as long as the buffer
        self.exchange = None
        self.generation = 0  # handles of an earlier one are of no use

    @property
    def is_whole(self) -> bool:
        return len(self.ranks) == self._num_ranks

    def exchange_for(self, device, **needs) -> Exchange:
        shape = {name: max(self._shape[name], needs.get(name, 1)) for name in _NEEDS}
        shape["max_row_bytes"] += -shape["max_row_bytes"] % 16
        capturing = is_capturing(device)
        if self.exchange is None or shape != self._shape:
            if capturing:
                grown = ", ".join(f"{name} = {shape[name]} (now {self._shape[name]})" for name in _NEEDS if shape[name] != self._shape[name])
                raise UsageError(f"a graph is being captured, and this call needs new buffers for {grown}; make it once before the capture")
            self.exchange = None  # frees its memory first
            self._shape, self._placements = shape, {}
            place = {"device": "cuda", "device_index": device.index} if device.type == "cuda" else {"device": "cpu"}
            self.exchange = Exchange(self.world, hidden_size=0, dtype="uint8", **place, **shape, **self._options)
            self.generation += 1
        if capturing and self.exchange not in self._captured:
            self._captured.append(self.exchange)
        return self.exchange

    def shrink(self) -> None:
        """Collective over the ranks that are left: goes on without the others, whose experts are nowhere then."""
        if self.exchange is None:  # they were lost while it was being made
            self.world, former = self.world.survivors()
        else:
            former = self.exchange.recover()
            self.world = self.exchange.world
        self.ranks = [self.ranks[rank] for rank in former]
        self.generation += 1

    def placement(self, num_experts: int) -> Placement:
        """Contiguous windows of experts, registered with the exchange."""
        if num_experts not in self._placements:
            if is_capturing(torch.device(self.exchange.device)):
                raise UsageError(f"a graph is being captured, and this is the first call with num_experts = {num_experts}; make it once before the capture")
            whole = Placement.uniform(num_experts, self._num_ranks)
            self._placements[num_experts] = whole if self.is_whole else whole.restricted_to(self.ranks)
            self.exchange.add(self._placements[num_experts])
        return self._placements[num_experts]


def refuse(exchange, reason):
    """This rank cannot make a call that the others may be waiting in: they learn why."""
    if not is_capturing(torch.device(exchange.device)):
        with contextlib.suppress(Error):  # of an earlier call, which they know of
            exchange.abandon(reason)
    raise UsageError(reason)


def rows_and_scales(x):
    """(rows, scales or None) of a tensor or of a pair (fp8, scales)."""
    return x if isinstance(x, (tuple, list)) else (x, None)


def padded_columns(weights):
    """Weights [N,K] as rows of a multiple of 16 bytes."""
    rows = weights.new_zeros(weights.shape[0], weights.shape[1] + -weights.shape[1] % 4)
    rows[:, :weights.shape[1]] = weights
    return rows


def fitted(tensor, rows, fill=None):
    """The tensor with that many rows: fewer, or new ones that hold `fill`, or anything."""
    if tensor is None or tensor.shape[0] >= rows:
        return tensor if tensor is None else tensor[:rows]
    longer = tensor.new_empty(rows, *tensor.shape[1:])
    longer[:tensor.shape[0]] = tensor
    if fill is not None:
        longer[tensor.shape[0]:] = fill
    return longer
