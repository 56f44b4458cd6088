"""What the tests share: frameworks, dtypes, ranks."""
import pickle

import numpy as np
import pytest

import tokenyard as ty
from reference import Reference, data, uniform_owners

try:
    import torch
except ImportError:
    torch = None

FRAMEWORKS = ["numpy", pytest.param("torch", marks=pytest.mark.skipif(torch is None, reason="torch is not installed"))]
DTYPES = ["float64", "float32", "bfloat16", "float16"]
HIDDEN, EXPERTS, TOP_K = 16, 7, 3
TOKENS = [5, 0, 9]


def to_bfloat16(values):
    """Exactly representable values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def make(values, dtype, framework):
    """An array of the framework; NumPy's bfloat16 is uint16."""
    if framework == "torch":
        return torch.tensor(np.asarray(values, np.float64)).to(getattr(torch, dtype))
    return to_bfloat16(values) if dtype == "bfloat16" else np.asarray(values).astype(dtype)


def numbers(array, dtype=None):
    """The values, as float64 (or the integers that they are)."""
    if torch is not None and isinstance(array, torch.Tensor):
        return array.to(torch.float64).numpy() if array.dtype.is_floating_point else array.numpy()
    if dtype == "bfloat16":
        assert array.dtype == np.uint16
        with np.errstate(invalid="ignore"):  # rows beyond the last hold anything
            return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def is_of(array, framework):
    return isinstance(array, np.ndarray if framework == "numpy" else torch.Tensor)


def scenario(seed=1, tokens=TOKENS, experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN):
    """(reference, placement) of a uniform placement over as many ranks as there are token counts."""
    placement = ty.Placement.uniform(experts, len(tokens))
    x, ids, weights = data(seed, tokens, hidden_size, experts, top_k)
    local = [len(placement.local_experts(rank)) for rank in range(len(tokens))]
    return Reference(x, ids, weights, uniform_owners(experts, len(tokens)), local), placement


def make_exchange(world, placement, dtype="float32", **options):
    options = {"hidden_size": HIDDEN, "top_k": TOP_K, "max_tokens_per_rank": max(TOKENS), "timeout_ms": 20_000, **options}
    return ty.Exchange(world, placement, dtype=dtype, **options)


class Comm:
    """A world as mpi4py shows it: deep_ep's buffers of rank threads."""

    def __init__(self, world):
        self._world = world
        self.Get_rank, self.Get_size = lambda: world.rank, lambda: world.size

    def allgather(self, value):
        return [pickle.loads(one) for one in self._world.all_gather(pickle.dumps(value))]


def on_ranks(fn, ranks=len(TOKENS), processes=False):
    """fn(world) on rank threads, or processes: the library makes no difference, and threads start faster."""
    return ty.run_ranks(fn, ranks, processes=processes, timeout_ms=30_000)


def expert(rank, local, row):
    """What the tests' experts do."""
    return row * (1 + (rank + local) % 3)
