"""Our layer on GPUs against the MoE blocks of Hugging Face transformers, out of files that it saved: rows, experts chosen, gradients."""
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import tokenyard as ty  # noqa: E402
import tokenyard.torch as tyt  # noqa: E402
from cuda_layer_test import settle  # noqa: E402
from cuda_test import gpu_of  # noqa: E402
from hugging_face import full_of  # noqa: E402
from hugging_face_test import TOKENS, TOLERANCE, close, config_for, family, parts_of, saved  # noqa: E402, F401
from support import on_ranks  # noqa: E402


@pytest.mark.parametrize("ep, tp", [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_a_layer_out_of_its_files(saved, ep, tp):  # noqa: F811
    folder, want = saved
    dtype, ranks = want["x"].dtype, ep * tp
    counts = {1: [sum(TOKENS)], 2: [TOKENS[0], sum(TOKENS) - TOKENS[0]], 4: TOKENS}[ranks]
    if ranks > torch.cuda.device_count():  # with two ranks on a GPU their kernels waited for each other now and then
        pytest.skip(f"{ranks} ranks need {ranks} GPUs")
    model, config = ty.MoeModel.read(folder), config_for(ep, tp)

    def rank_main(world):
        gpu_of(world)
        group = ty.ExpertGroup.of_model(world, config, model, max(counts), dtype=str(dtype).removeprefix("torch."), device="cuda", sm_budget=16,
                                        gradients=True, timeout_ms=20_000)
        layer = tyt.MoeLayer.from_checkpoint(group, folder, 0, model)
        x = parts_of(want["x"], counts)[world.rank].cuda().requires_grad_()
        d_out = parts_of(want["d_out"], counts)[world.rank].cuda()
        torch.zeros(4, device="cuda").to(dtype).clone()[...] = 0  # kernels are loaded now: that may wait for those that wait for peers
        world.barrier()
        with torch.no_grad():
            latency = layer(x, mode="latency")
        out, gated = layer(x, with_routing=True)
        out.backward(d_out)
        settle(world)
        gradients = {name: (p.grad.cpu(), shard.map if (shard := tyt.shard_of(p)) else None) for name, p in layer.named_parameters()}
        return out.detach().cpu(), latency.cpu(), gated.topk_ids, x.grad.cpu(), gradients

    found = on_ranks(rank_main, ranks)
    outs, latencies, ids, d_x, gradients = zip(*found)
    assert torch.equal(torch.cat(ids).sort(1).values, want["ids"])
    close(torch.cat(outs), want["out"], TOLERANCE[dtype], "out")
    close(torch.cat(latencies), want["out"], TOLERANCE[dtype], "out, latency")
    close(torch.cat(d_x), want["d_x"], TOLERANCE[dtype], "gradient of x")
    for name in {"gate_weight", "logit_bias", "w13", "w2", "w13_bias", "w2_bias", "shared_w13", "shared_w2"} & want.keys():
        parts = [of_rank[name] for of_rank in gradients if name in of_rank]
        if parts[0][1] is None:
            total = sum(part.float() for part, _ in parts)
        else:
            total = full_of([part for part, _ in parts], [map for _, map in parts], want[name].shape)
        close(total, want[name], TOLERANCE[dtype], f"gradient of {name}")
