"""Four ranks route their tokens, dispatch them to the ranks of their experts, and get the weighted sums back."""
import numpy as np

import tokenyard as ty


def rank_main(world):
    placement = ty.Placement.uniform(num_experts=8, ranks=world.size)
    exchange = ty.Exchange(world, placement, hidden_size=64, top_k=2, max_tokens_per_rank=16, dtype="float32")
    x, logits = np.ones((16, 64), np.float32), np.random.default_rng(world.rank).standard_normal((16, 8), np.float32)
    topk_ids, topk_weights, _ = ty.route(logits, ty.Gate.softmax(top_k=2, renormalise=True))
    out = exchange.dispatch(x, topk_ids, topk_weights, layout="expert_major")
    y = exchange.combine(out.rows, out.handle, weighting="at_expert")  # experts would compute between the two
    assert np.allclose(y, x), "combine did not return the rows"
    return out.num_rows


print("rows computed by each rank:", ty.run_ranks(rank_main, 4))
