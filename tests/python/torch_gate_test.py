"""Gradients of gates and their losses against the same formulas in torch."""
import pytest

torch = pytest.importorskip("torch")

import tokenyard as ty  # noqa: E402
import tokenyard.torch as tyt  # noqa: E402

TOKENS, EXPERTS, TOP_K = 9, 8, 3


def make_logits(seed=1, dtype=torch.float32):
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def weights_in_torch(logits, ids, kind, renormalise, scale):
    scores = logits.softmax(1) if kind == "softmax" else logits.sigmoid()
    if kind == "softmax" and renormalise:
        return scale * logits.gather(1, ids).softmax(1)
    chosen = scores.gather(1, ids)
    return scale * (chosen / chosen.sum(1, keepdim=True) if renormalise else chosen)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_weights(kind, renormalise):
    logits = make_logits()
    gated = tyt.route(logits, getattr(ty.Gate, kind)(TOP_K, renormalise=renormalise, scale=2.5))
    assert gated.topk_ids.equal(logits.topk(TOP_K).indices) and gated.load.sum() == TOKENS * TOP_K
    expected = weights_in_torch(logits, gated.topk_ids, kind, renormalise, 2.5)
    torch.testing.assert_close(gated.topk_weights, expected)
    upstream = torch.randn(TOKENS, TOP_K, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(torch.autograd.grad(gated.topk_weights, logits, upstream)[0], torch.autograd.grad(expected, logits, upstream)[0],
                               rtol=1e-4, atol=1e-6)


def losses_in_torch(all_logits, all_ids, balance_alpha, z_alpha):
    logits, ids = torch.cat(all_logits), torch.cat(all_ids)
    load = torch.bincount(ids.flatten(), minlength=EXPERTS).float()
    balance = balance_alpha * EXPERTS / load.sum() * (load * logits.softmax(1).mean(0)).sum()
    return balance + z_alpha * (logits.logsumexp(1) ** 2).mean()


def test_losses_of_all_ranks():
    gate = ty.Gate.softmax(TOP_K, renormalise=True)
    all_logits = [make_logits(seed) for seed in (3, 4)]
    all_ids = [logits.topk(TOP_K).indices for logits in all_logits]
    expected = losses_in_torch(all_logits, all_ids, 0.5, 0.25)
    gradients = torch.autograd.grad(expected, all_logits)

    def rank_main(world):
        logits = make_logits(3 + world.rank)
        loss = tyt.route(logits, gate).losses(0.5, 0.25, world)
        return loss.detach(), torch.autograd.grad(3 * loss, logits)[0]

    for rank, (loss, gradient) in enumerate(ty.run_ranks(rank_main, 2, processes=False)):
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, 3 * gradients[rank], rtol=1e-4, atol=1e-6)


def test_masked_tokens_and_bfloat16():
    logits = make_logits(5, torch.bfloat16)
    gated = tyt.route(logits, ty.Gate.softmax(TOP_K), mask=torch.arange(TOKENS) % 2 == 0)
    gradient = torch.autograd.grad(gated.topk_weights.sum() + gated.losses(1.0, 1.0), logits)[0]
    assert gradient.dtype == torch.bfloat16 and (gradient[1::2] == 0).all() and (gradient[0::2] != 0).any()


def test_through_a_dispatcher():
    """Logits get a gradient through gate, dispatch, experts and combine."""
    placement = ty.Placement.uniform(EXPERTS, 1)
    dispatcher = tyt.MoEDispatcher(ty.World.in_process(1)[0], placement, hidden_size=4, top_k=TOP_K, max_tokens_per_rank=TOKENS, dtype="float32", kind="direct")
    logits, x = make_logits(6), torch.randn(TOKENS, 4, generator=torch.Generator().manual_seed(7))
    gated = tyt.route(logits, ty.Gate.softmax(TOP_K))
    y = dispatcher(x, gated.topk_ids, gated.topk_weights, lambda rows, counts: rows * torch.repeat_interleave(torch.arange(8.0), torch.tensor(counts))[:, None])
    ids = gated.topk_ids
    expected = (logits.softmax(1).gather(1, ids) * ids).sum(1, keepdim=True) * x
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0], rtol=1e-4, atol=1e-5)


def test_the_cpu_computes():
    for call in (lambda: ty.route(torch.ones(1, 2, device="meta"), ty.Gate.softmax(1)), lambda: ty.quantise(torch.ones(1, 2, device="meta"))):
        with pytest.raises(ty.UsageError, match="is on meta; this is computed on the CPU"):
            call()
