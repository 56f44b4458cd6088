"""Which dispatch a tuple of tensors stands for: callers keep tensors, or copies of them, and nothing else."""
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from tokenyard import UsageError

KEPT = 256  # of recent dispatches; an older one's routing travels again when it is used
_serials = itertools.count(1)


@dataclass
class Known:
    """One dispatch: the exchange's handle, and how many rows combine takes for it."""

    generation: int  # of the exchange that made it
    handle: Any
    rows: int
    serials: torch.Tensor = None  # lives as long as this, so that no other tensor has its address


def parts_of(handle):
    """(serials, whether a token goes to a rank, number of rows received) of DeepEP's tuple: of 6 tensors, of 10 with more than 8 ranks."""
    if not isinstance(handle, (tuple, list)) or len(handle) not in (6, 10):
        found = f"{type(handle).__name__}{f' of {len(handle)}' if isinstance(handle, (tuple, list)) else ''}"
        raise UsageError(f"handle is a {found}; expected the tuple of 6 tensors, with more than 8 ranks of 10, that dispatch returned")
    at_serials, at_in_rank, at_rows = (1, 4, 3) if len(handle) == 6 else (1, 0, 7)
    return handle[at_serials], handle[at_in_rank], handle[at_rows].shape[0]


class Handles:
    def __init__(self):
        self._known = OrderedDict()  # by serial
        self._serial_at = {}  # by address, so that nobody has to wait for what a tensor on a GPU holds

    def remember(self, known, shape, device):
        """A tensor full of the number under which this dispatch is found again."""
        serial = next(_serials)
        known.serials = torch.full(shape, serial, dtype=torch.int32, device=device)
        self._known[serial] = known
        self._serial_at[known.serials.data_ptr()] = serial
        while len(self._known) > KEPT:
            _, oldest = self._known.popitem(last=False)
            self._serial_at.pop(oldest.serials.data_ptr(), None)
        return known.serials

    def find(self, serials, generation):
        """The dispatch of such a tensor or of a copy, or None when it was too long ago or of an earlier exchange."""
        known = self._known.get(self._serial_at.get(serials.data_ptr()))
        if known is None:
            known = self._known.get(int(serials[0, 0]))
        return known if known is not None and known.generation == generation else None

    def clear(self):
        self._known.clear()
        self._serial_at.clear()
