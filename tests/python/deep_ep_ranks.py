"""Ranks of a gloo group for the tests of deep_ep, what they are given, and who receives it."""
import torch

import tokenyard as ty

RANKS, TOKENS, HIDDEN, EXPERTS, TOP_K = 3, [4, 0, 6], 256, 6, 2
WINDOW = EXPERTS // RANKS


def on_group(fn, tmp_path, ranks=RANKS):
    """fn(group, rank) in processes with a gloo group."""
    def rank_main(world):
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=world.rank, world_size=world.size)
        try:
            return fn(dist.group.WORLD, world.rank)
        finally:
            dist.destroy_process_group()

    return ty.run_ranks(rank_main, ranks, timeout_ms=30_000)


def given(seed=1):
    """Of all ranks: x of small whole numbers, ids with masked ones, weights of quarters."""
    rng = torch.Generator().manual_seed(seed)
    x = [torch.randint(-3, 4, (t, HIDDEN), generator=rng).bfloat16() for t in TOKENS]
    ids = [torch.stack([torch.randperm(EXPERTS, generator=rng)[:TOP_K] for _ in range(t)]) if t else torch.zeros(0, TOP_K).long() for t in TOKENS]
    ids = [torch.where(torch.rand(i.shape, generator=rng) < 0.2, -1, i) for i in ids]
    weights = [torch.randint(1, 5, (t, TOP_K), generator=rng) / 4 for t in TOKENS]
    return x, ids, weights


def received_by(rank, ids):
    """(source, token) of the rows of a rank, in order."""
    return [(s, t) for s in range(RANKS) for t in range(TOKENS[s]) if any(e >= 0 and e // WINDOW == rank for e in ids[s][t].tolist())]


def stack(rows, like):
    return torch.stack(rows) if rows else like[:0]
