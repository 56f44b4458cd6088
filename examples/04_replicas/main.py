"""One expert gets half of all tokens: replicas of it even the load, and the answer stays the same."""
import numpy as np

import tokenyard as ty

HIDDEN, EXPERTS, TOP_K, TOKENS, RANKS, HOT = 32, 8, 1, 400, 4, 5


def batch(rank):
    rng = np.random.default_rng(rank)
    ids = np.where(rng.random((TOKENS, TOP_K)) < 0.5, HOT, rng.integers(0, EXPERTS, (TOKENS, TOP_K)))
    return rng.integers(-4, 5, (TOKENS, HIDDEN)).astype(np.float32), ids


def placements():
    load = sum(np.bincount(batch(rank)[1].ravel(), minlength=EXPERTS) for rank in range(RANKS))
    return ty.Placement.uniform(EXPERTS, RANKS), ty.Placement.replicated(EXPERTS, RANKS, load.tolist(), redundant=4)


def rank_main(world):
    plain, replicated = placements()
    exchange = ty.Exchange(world, [plain, replicated], hidden_size=HIDDEN, top_k=TOP_K, max_tokens_per_rank=TOKENS, dtype="float32")
    x, ids = batch(world.rank)
    results = []
    for placement in (plain, replicated):
        out = exchange.dispatch(x, ids, placement=placement, layout="expert_major")
        y = out.rows * np.repeat(np.array(placement.local_experts(world.rank)) + 1.0, out.expert_counts)[:, None].astype(np.float32)
        np.testing.assert_array_equal(exchange.combine(y, out.handle), x * (ids + 1))
        results.append(out.num_rows)
    return results


before, after = np.array(ty.run_ranks(rank_main, RANKS)).T
copies = len(placements()[1].replicas(HOT))
print(f"rows per rank without replicas {before.tolist()}, with {copies} of expert {HOT} {after.tolist()}")
print(f"{len(ty.moves(*placements()))} experts' weights have to travel for it")
assert after.max() < 0.6 * before.max() and after.sum() == before.sum() == RANKS * TOKENS
