"""Megatron-core's flex dispatcher over the deep_ep drop-in: a training step gives the loss and the gradients of a dense layer."""
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install megatron-core)")

import tokenyard as ty  # noqa: E402

RANKS, EXPERTS, TOP_K, HIDDEN, TOKENS = 2, 4, 2, 64, 12
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"fewer than {RANKS} GPUs"))]


def make_dispatcher(world_size, rank):
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(expert_model_parallel_size=world_size, expert_tensor_parallel_size=1)
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, num_moe_experts=EXPERTS, moe_router_topk=TOP_K, expert_model_parallel_size=world_size,
        moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep", moe_router_dtype="fp32", add_bias_linear=False)
    local = EXPERTS // world_size
    return MoEFlexTokenDispatcher(local, list(range(rank * local, (rank + 1) * local)), config, get_default_pg_collection())


def data(rank, device):
    """(x [T,H], weights of all experts [E,H,H], the routing as Megatron's router gives it: map and probabilities [T,E])."""
    rng = torch.Generator().manual_seed(7)
    weights = (torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=rng) / HIDDEN ** 0.5).to(device).requires_grad_()
    rng.manual_seed(100 + rank)
    x = torch.randn(TOKENS, HIDDEN, generator=rng).to(device).requires_grad_()
    probabilities, chosen = torch.randn(TOKENS, EXPERTS, generator=rng).softmax(1).topk(TOP_K)
    given = torch.zeros(TOKENS, EXPERTS).scatter(1, chosen, probabilities).to(device).requires_grad_()
    return x, weights, given


def dense(x, weights, given):
    return torch.einsum("te,teh->th", given, torch.tanh(torch.einsum("th,ehf->tef", x, weights)))


def through_megatron(dispatcher, rank, x, weights, given):
    local = EXPERTS // RANKS
    states, probabilities = dispatcher.dispatch_preprocess(x, given > 0, given)
    states, probabilities = dispatcher.token_dispatch(states, probabilities)
    rows, counts, row_weights = dispatcher.dispatch_postprocess(states, probabilities)
    parts = [torch.tanh(part @ weights[rank * local + e]) for e, part in enumerate(rows.split(counts.tolist()))]
    y = torch.cat(parts) * row_weights[:, None]
    return dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(y)))


def train_step(rank, world_size, device, meeting):
    import torch._dynamo
    import torch.distributed as dist

    torch._dynamo.config.disable = True  # Megatron has parts compiled, which takes longer than all else here
    if device == "cuda":
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
    dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=world_size)
    try:
        dispatcher = make_dispatcher(world_size, rank)
        for _ in range(2):  # the second step finds the buffers of the first
            x, weights, given = data(rank, device)
            target = torch.arange(HIDDEN, device=device) / HIDDEN
            y = through_megatron(dispatcher, rank, x, weights, given)
            ((y - target) ** 2).sum().backward()
            dist.all_reduce(weights.grad)
            grads = x.grad, weights.grad, given.grad
            x, weights, given = data(rank, device)
            expected = dense(x, weights, given)
            ((expected - target) ** 2).sum().backward()
            dist.all_reduce(weights.grad)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            chosen = given > 0
            for ours, theirs in zip(grads, (x.grad, weights.grad, given.grad * chosen)):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        return y.abs().sum().item()
    finally:
        dist.destroy_process_group()


def rank_main(world, device, meeting):
    return train_step(world.rank, world.size, device, meeting)


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_step(device, tmp_path):
    method = "spawn" if device == "cuda" else None  # importing Megatron has touched CUDA
    assert all(total > 0 for total in ty.run_ranks(rank_main, RANKS, device, f"file://{tmp_path}/meeting", start_method=method, timeout_ms=60_000))
