"""tokenyard.torch.MoeLayer as a module: parameters, autograd, losses, checkpoints, training in any layout."""
import pytest

torch = pytest.importorskip("torch")

import tokenyard as ty  # noqa: E402
import tokenyard.torch as tyt  # noqa: E402
from support import on_ranks  # noqa: E402

EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 2, 16, 8
TOKENS = [5, 0, 3, 4]
NAMES = {
    "qwen3_moe": {"gate_weight", "w13", "w2"},
    "deepseek_v3": {"gate_weight", "w13", "w2", "shared_w13", "shared_w2"},
    "gpt_oss": {"gate_weight", "logit_bias", "w13", "w2", "w13_bias", "w2_bias"},
}


def model_of(family):
    if family == "deepseek_v3":
        return ty.MoeModel(family, EXPERTS, TOP_K, HIDDEN, WIDTH, ty.Gate.bias_corrected(TOP_K, num_groups=4, topk_groups=2, scale=2.5), shared_expert_width=4)
    return ty.MoeModel(family, EXPERTS, TOP_K, HIDDEN, WIDTH, ty.Gate.softmax(TOP_K, renormalise=True), activation="clamped" if family == "gpt_oss" else "silu")


def layer_of(world, family, ep, tp, expert_tp="virtual", placement=None, **options):
    config = ty.parallel.solve(device_count=ep * tp, ep=ep, mlp_tp=tp, dp=ep * tp, tp=tp, attn_tp=1)
    group = ty.ExpertGroup.of_model(world, config, model_of(family), sum(TOKENS), expert_tp=expert_tp, timeout_ms=20_000, **options)
    return tyt.MoeLayer.initialised(group, model_of(family), "layers.0", placement=placement, seed=3, scale=0.3)


def rows(seed):
    return [torch.randn(t, HIDDEN, generator=torch.Generator().manual_seed(seed + i)) for i, t in enumerate(TOKENS)]


def train(world, layer, steps):
    """Losses of every step, of which the gate's are a part; SGD."""
    optimizer, x, told = torch.optim.SGD(layer.parameters(), lr=0.002), rows(10), []
    for _ in range(steps):
        mine = x[world.rank] if world.size > 1 else torch.cat(x)
        out, gated = layer(mine, with_routing=True)
        loss = (out - mine.roll(1, 1)).square().sum()
        (loss + gated.losses(0.1, 0.01, world)).backward()
        layer.sum_gradients()
        optimizer.step()
        optimizer.zero_grad()
        told.append(sum(float(torch.frombuffer(bytearray(part), dtype=torch.float32)[0]) for part in world.all_gather(loss.detach().reshape(1).numpy().tobytes())))
    return told


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("ep, tp, expert_tp", [(4, 1, "virtual"), (2, 2, "virtual"), (2, 2, "gathered"), (1, 4, "gathered")])
def test_training_knows_no_layout(family, ep, tp, expert_tp):
    """The same losses, step by step, as one rank with all tokens; and they fall."""
    alone = on_ranks(lambda world: train(world, layer_of(world, family, 1, 1), 4), 1)[0]
    assert alone[-1] < 0.95 * alone[0]

    def rank_main(world):
        layer = layer_of(world, family, ep, tp, expert_tp)
        assert {name for name, _ in layer.named_parameters()} == NAMES[family] - ({"w2_bias"} if world.rank % tp else set())
        return train(world, layer, 4)

    for losses in on_ranks(rank_main, 4):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone), rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("family", NAMES)
def test_training_knows_no_replicas(family):
    """Experts 0, 1 and 7 have replicas; rank 2 holds no expert with another."""
    ranks = [[0, 1, 3], [3, 0], [1], [1], [2], [2], [2], [3, 1]]
    placement = ty.Placement.custom(4, [[ty.Replica([rank]) for rank in of] for of in ranks])
    alone = on_ranks(lambda world: train(world, layer_of(world, family, 1, 1), 4), 1)[0]
    options = {"placement": placement, "max_local_experts": placement.max_local_experts}
    for losses in on_ranks(lambda world: train(world, layer_of(world, family, 4, 1, **options), 4), 4):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone), rtol=2e-5, atol=1e-4)


def test_dense_tp_cuts_the_shared_expert():
    x = rows(20)
    whole = on_ranks(lambda world: layer_of(world, "deepseek_v3", 4, 1)(x[world.rank]).detach(), 4)

    def rank_main(world):
        layer = layer_of(world, "deepseek_v3", 4, 1, dense_tp=2)
        assert layer.shared_w13.shape == (1, 2, 2, HIDDEN)
        return layer(x[world.rank]).detach()

    for a, b in zip(whole, on_ranks(rank_main, 4)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_losses_go_through_the_gate():
    """Of the losses alone: as tokenyard.torch.route() of logits made by torch."""
    layer = layer_of(ty.World.in_process(1)[0], "qwen3_moe", 1, 1)
    x = torch.cat(rows(30)).requires_grad_()
    layer(x, with_routing=True)[1].losses(0.5, 0.25).backward()
    y = x.detach().requires_grad_()
    gate = layer.gate_weight.detach().requires_grad_()
    tyt.route(y @ gate.t(), layer.gate).losses(0.5, 0.25).backward()
    torch.testing.assert_close(layer.gate_weight.grad, gate.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)


def test_module_habits():
    """Batches of any shape, no graph without grad, other memory and other types of parameters, values that change in place."""
    layer = layer_of(ty.World.in_process(1)[0], "qwen3_moe", 1, 1)
    x = torch.cat(rows(40))
    out = layer(x)
    assert torch.equal(layer(x.view(3, 4, HIDDEN)), out.view(3, 4, HIDDEN))
    with torch.no_grad():
        assert layer(x).grad_fn is None
        layer.w2.mul_(2)
        torch.testing.assert_close(layer(x), 2 * out, rtol=1e-5, atol=1e-5)
        layer.w2 = torch.nn.Parameter(layer.w2 / 2)
        assert torch.equal(layer(x), out)
        layer.bfloat16()
        torch.testing.assert_close(layer(x.bfloat16()).float(), out, rtol=0.1, atol=0.05 * float(out.abs().max()))
        layer.float()
        layer.gate_weight.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert layer.gate_weight.grad is None and x.grad.abs().sum() > 0 and layer.w13.grad.abs().sum() > 0


def test_what_would_be_wrong_is_refused():
    layer = layer_of(ty.World.in_process(1)[0], "qwen3_moe", 1, 1)
    x = torch.cat(rows(50)).requires_grad_()
    out = layer(x)
    with torch.no_grad():
        layer.w13.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    layer.w2 = torch.nn.Parameter(layer.w2.detach().transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ty.UsageError, match="w2 is not dense"):
        layer(x)


def test_checkpoints_of_layers(tmp_path):
    """Trained on (2,2), saved, loaded on (1,4) with momentum: the next step is the same."""
    def trained(world, layer, optimizer, steps):
        x = rows(60)
        for _ in range(steps):
            layer(x[world.rank]).square().sum().backward()
            layer.sum_gradients()
            optimizer.step()
            optimizer.zero_grad()
        return layer(x[world.rank]).detach()

    def rank_main(world):
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=world.rank, world_size=4)
        layer = layer_of(world, "deepseek_v3", 2, 2, dense_tp=2)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        trained(world, layer, optimizer, 2)
        dcp.save({"training": tyt.TrainingState(layer, optimizer)}, checkpoint_id=tmp_path / "saved")
        expected = trained(world, layer, optimizer, 1)
        other = layer_of(world, "deepseek_v3", 1, 4)
        optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
        dcp.load({"training": tyt.TrainingState(other, optimizer)}, checkpoint_id=tmp_path / "saved")
        torch.testing.assert_close(trained(world, other, optimizer, 1), expected, rtol=1e-4, atol=1e-4)
        dist.destroy_process_group()

    ty.run_ranks(rank_main, 4, timeout_ms=60_000)
