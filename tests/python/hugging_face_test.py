"""Our layer against the MoE blocks of Hugging Face transformers, out of files that it saved: rows, experts chosen, gradients."""
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tokenyard as ty  # noqa: E402
import tokenyard.torch as tyt  # noqa: E402
from hugging_face import FAMILIES, HIDDEN, full_of, gradients_by_autograd, run, save  # noqa: E402
from support import on_ranks  # noqa: E402

TOKENS = [7, 0, 11, 6]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# ep, mlp_tp, how experts are divided
LAYOUTS = [(1, 1, "virtual"), (4, 1, "virtual"), (2, 2, "virtual"), (2, 2, "gathered"), (1, 4, "gathered")]


def config_for(ep, tp):
    return ty.parallel.solve(device_count=ep * tp, ep=ep, mlp_tp=tp, dp=ep * tp, tp=tp, attn_tp=1, cp=1)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def saved(family, request, tmp_path_factory):
    """(folder, what the block makes of x): out, the experts of each token, gradients of x and weights given d_out."""
    dtype, folder = request.param, tmp_path_factory.mktemp(family)
    block = save(family, dtype, folder)
    x = torch.randn(sum(TOKENS), HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    d_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        out, ids = run(block, x)
    # Gradients of the block in float32, with the same weights: in bfloat16 its own are off by about as much as the tolerance (gpt-oss
    # rounds even its softmax).
    found = gradients_by_autograd(block.float(), x.float(), d_out.float())
    return folder, {"x": x, "out": out, "ids": ids, "d_out": d_out, **found}


def close(found, expected, tolerance, what):
    """Relative to the size of each row of the last axis, and to the tensor's where a row is small."""
    found, expected = found.detach().double(), expected.double()
    scale = expected.norm(dim=-1, keepdim=True).clamp(min=0.1 * float(expected.norm(dim=-1).max()))
    error = float(((found - expected).norm(dim=-1, keepdim=True) / scale).max())
    assert error < tolerance, f"{what}: relative error {error:.2e}"
    return error


def parts_of(tensor, counts):
    return tensor.split(counts)


@pytest.mark.parametrize("ep, tp, expert_tp", LAYOUTS)
def test_a_layer_out_of_its_files(saved, ep, tp, expert_tp):
    folder, want = saved
    dtype, ranks = want["x"].dtype, ep * tp
    counts = [sum(TOKENS)] if ranks == 1 else TOKENS
    model, config = ty.MoeModel.read(folder), config_for(ep, tp)

    def rank_main(world):
        group = ty.ExpertGroup.of_model(world, config, model, max(counts), dtype=str(dtype).removeprefix("torch."), expert_tp=expert_tp, timeout_ms=30_000)
        layer = tyt.MoeLayer.from_checkpoint(group, folder, 0, model)
        x = parts_of(want["x"], counts)[world.rank].clone().requires_grad_()
        out, gated = layer(x, with_routing=True)
        out.backward(parts_of(want["d_out"], counts)[world.rank])
        with torch.no_grad():  # the same in the mode for few tokens
            close(torch.cat([layer(x, mode="latency"), torch.ones(1, HIDDEN)]), torch.cat([out, torch.ones(1, HIDDEN)]), TOLERANCE[dtype], "latency")
        gradients = {name: (p.grad, shard.map if (shard := tyt.shard_of(p)) else None) for name, p in layer.named_parameters()}
        return out, gated.topk_ids, x.grad, gradients

    found = on_ranks(rank_main, ranks)
    tolerance = TOLERANCE[dtype]
    assert torch.equal(torch.cat([ids for _, ids, _, _ in found]).sort(1).values, want["ids"])
    close(torch.cat([out for out, _, _, _ in found]), want["out"], tolerance, "out")
    close(torch.cat([d_x for _, _, d_x, _ in found]), want["d_x"], tolerance, "gradient of x")
    for name in {"gate_weight", "logit_bias", "w13", "w2", "w13_bias", "w2_bias", "shared_w13", "shared_w2"} & want.keys():
        parts = [gradients[name] for _, _, _, gradients in found if name in gradients]
        if parts[0][1] is None:
            total = sum(part.float() for part, _ in parts)
        else:
            total = full_of([part for part, _ in parts], [map for _, map in parts], want[name].shape)
        close(total, want[name], tolerance, f"gradient of {name}")
