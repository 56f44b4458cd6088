"""Experts cut over two ranks (EP x TP): one exchange over all ranks brings a token to both shards and adds what they return."""
import numpy as np

import tokenyard as ty

HIDDEN, WIDTH, EXPERTS, TOP_K, TOKENS, EP, TP = 16, 24, 4, 2, 10, 2, 2


def weights(expert):
    rng = np.random.default_rng(expert)
    return rng.standard_normal((HIDDEN, WIDTH)), rng.standard_normal((WIDTH, HIDDEN))


def batch(rank):
    rng = np.random.default_rng(100 + rank)
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    return rng.standard_normal((TOKENS, HIDDEN)), ids, rng.random((TOKENS, TOP_K), np.float32)


def rank_main(world):
    placement = ty.Placement.tensor_parallel(EXPERTS, EP, TP)
    exchange = ty.Exchange(world, placement, hidden_size=HIDDEN, top_k=TOP_K, max_tokens_per_rank=TOKENS, dtype="float64")
    shard = world.rank % TP
    mine = slice(shard * WIDTH // TP, (shard + 1) * WIDTH // TP)  # of every local expert's width
    x, ids, factors = batch(world.rank)
    out = exchange.dispatch(x, ids, factors, layout="expert_major")
    rows, begins = out.rows, out.expert_offsets
    partial = np.empty_like(rows)
    for local, expert in enumerate(placement.local_experts(world.rank)):
        up, down = weights(expert)
        group = slice(begins[local], begins[local + 1])
        partial[group] = np.maximum(rows[group] @ up[:, mine], 0) @ down[mine]
    return exchange.combine(partial, out.handle, weighting="at_expert")


for rank, found in enumerate(ty.run_ranks(rank_main, EP * TP)):
    x, ids, factors = batch(rank)
    expected = np.zeros_like(x)
    for token, k in np.ndindex(ids.shape):
        up, down = weights(ids[token, k])
        expected[token] += factors[token, k] * (np.maximum(x[token] @ up, 0) @ down)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
print(f"{EP * TP} ranks, each with {EXPERTS // EP} experts and {WIDTH // TP} of their {WIDTH} columns, give the answer of whole experts")
