"""Our layer on GPUs against the MoE blocks of Hugging Face transformers, out of files that it saved: rows, and experts chosen."""
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import tokenyard as ty  # noqa: E402
import tokenyard.torch as tyt  # noqa: E402
from cuda_layer_test import settle  # noqa: E402
from cuda_test import gpu_of  # noqa: E402
from hugging_face_test import TOKENS, TOLERANCE, close, config_for, family, parts_of, saved  # noqa: E402, F401
from support import on_ranks  # noqa: E402


@pytest.mark.parametrize("ep, tp", [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_a_layer_out_of_its_files(saved, ep, tp):  # noqa: F811
    folder, want = saved
    dtype, ranks = want["x"].dtype, ep * tp
    counts = {1: [sum(TOKENS)], 2: [TOKENS[0], sum(TOKENS) - TOKENS[0]], 4: TOKENS}[ranks]
    if ranks > 2 * torch.cuda.device_count():
        pytest.skip(f"{ranks} ranks need {ranks // 2} GPUs")
    model, config = ty.MoeModel.read(folder), config_for(ep, tp)

    def rank_main(world):
        gpu_of(world)
        group = ty.ExpertGroup.of_model(world, config, model, max(counts), dtype=str(dtype).removeprefix("torch."), device="cuda", sm_budget=16, timeout_ms=30_000)
        layer = tyt.MoeLayer.from_checkpoint(group, folder, 0, model)
        x = parts_of(want["x"], counts)[world.rank].cuda()
        torch.empty(1, device="cuda")
        world.barrier()  # nobody allocates any more
        with torch.no_grad():
            out, gated = layer(x, with_routing=True)
            latency = layer(x, mode="latency")
        settle(world)
        return out.cpu(), latency.cpu(), gated.topk_ids

    found = on_ranks(rank_main, ranks)
    assert torch.equal(torch.cat([ids for _, _, ids in found]).sort(1).values, want["ids"])
    close(torch.cat([out for out, _, _ in found]), want["out"], TOLERANCE[dtype], "out")
    close(torch.cat([latency for _, latency, _ in found]), want["out"], TOLERANCE[dtype], "out, latency")
