"""Scores whose top-k sends more tokens to the first rank than to the others."""
import torch


def get_unbalanced_scores(num_tokens, num_experts, num_ranks, num_topk, ratio, precise):
    """[T,E] float32. ratio: tokens of rank 0 over those of another rank; exact counts when precise, else in the mean."""
    if precise:
        return _precise(num_tokens, num_experts, num_ranks, num_topk, ratio)
    low, high = 1.0, 100.0
    for _ in range(0 if ratio == 1.0 else 20):
        factor = (low + high) / 2
        chosen = _scaled(num_tokens, num_experts, num_ranks, factor).topk(num_topk).indices // (num_experts // num_ranks)
        per_rank = torch.nn.functional.one_hot(chosen, num_ranks).amax(1).float().sum(0)
        low, high = (low, factor) if per_rank[0] > ratio * per_rank[1:].mean() else (factor, high)
    return _scaled(num_tokens, num_experts, num_ranks, low)


def _scaled(num_tokens, num_experts, num_ranks, factor):
    scores = torch.rand(num_tokens, num_experts, dtype=torch.float32)
    scores[:, :num_experts // num_ranks] *= factor
    return scores


def _precise(num_tokens, num_experts, num_ranks, num_topk, ratio):
    """Every token goes to as many ranks as random choices would; rank 0 is one of them for exactly so many tokens, and the others
    take turns."""
    window = num_experts // num_ranks
    choices = torch.rand(num_tokens, num_experts, dtype=torch.float32).topk(num_topk).indices // window
    widths = torch.nn.functional.one_hot(choices, num_ranks).amax(1).sum(1)
    fewest, most = max(1, -(-num_topk // window)), min(num_topk, num_ranks, int((num_ranks - 1) / ratio) + 1)
    widths = widths.clamp(fewest, max(fewest, most)).tolist()
    first = min(num_tokens, round(sum(widths) * ratio / (ratio + num_ranks - 1)))
    with_first = set(torch.randperm(num_tokens)[:first].tolist())
    scores, turn = torch.rand(num_tokens, num_experts, dtype=torch.float32) / 2, 0
    for token, width in enumerate(widths):
        ranks = [0] if token in with_first else []
        while len(ranks) < min(width, num_ranks - 1 + len(ranks[:1])) and num_ranks > 1:
            ranks.append(1 + turn % (num_ranks - 1))
            turn += 1
        for k in range(num_topk):
            rank, nth = ranks[k % len(ranks)], k // len(ranks)
            scores[token, rank * window + (token + nth) % window] = 0.6 + 0.4 * float(torch.rand(1))
    return scores
