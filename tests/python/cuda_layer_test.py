"""MoeLayer on CUDA tensors: the model in one process, in the order of torch's current stream, over and over from a graph."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import tokenyard as ty  # noqa: E402
import tokenyard.torch as tyt  # noqa: E402
from cuda_graph_test import captured  # noqa: E402
from cuda_test import gpu_of  # noqa: E402
from model_test import FP8_MODEL, fp8_checkpoint  # noqa: E402
from support import on_ranks  # noqa: E402

EXPERTS, TOP_K, HIDDEN, WIDTH, SHARED, TOKENS = 6, 2, 32, 16, 16, [5, 0, 3, 4]
MODEL = ty.MoeModel(family="qwen3_moe", num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, expert_width=WIDTH, shared_expert_width=SHARED,
                    gate=ty.Gate.softmax(TOP_K, renormalise=True))
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def full_weights(dtype):
    """Of the whole layer, rounded to the dtype."""
    rng = torch.Generator().manual_seed(1)

    def draw(*shape):
        return (torch.randn(*shape, generator=rng) / 2).to(dtype)

    return ty.MoeWeights(gate_weight=draw(EXPERTS, HIDDEN), w13=draw(EXPERTS, 2, WIDTH, HIDDEN), w2=draw(EXPERTS, HIDDEN, WIDTH),
                         shared_w13=draw(1, 2, SHARED, HIDDEN), shared_w2=draw(1, HIDDEN, SHARED), shared_gate=draw(1, HIDDEN))


def feed_forward(x, w13, w2):
    return (torch.nn.functional.silu(x @ w13[0].T) * (x @ w13[1].T)) @ w2.T


def by_hand(x, full):
    """(out [T,H] float64, logits [T,E])."""
    w = ty.MoeWeights(*(None if array is None else array.double() for _, array in full.items()))
    x = x.double()
    logits = x @ w.gate_weight.T
    chosen = logits.topk(TOP_K, dim=1)
    out = feed_forward(x, w.shared_w13[0], w.shared_w2[0]) * torch.sigmoid(x @ w.shared_gate.T)
    for weight, expert in zip(chosen.values.softmax(1).T, chosen.indices.T):
        out = out + torch.stack([p * feed_forward(row, w.w13[e], w.w2[e]) for row, p, e in zip(x, weight, expert)] or [out.new_empty(0, HIDDEN)]).view(x.shape)
    return out, logits


def make_layer(world, ep, tp, dtype, **options):
    """On this rank's GPU, its parts of the full weights."""
    gpu_of(world)
    config = ty.parallel.solve(device_count=ep * tp, ep=ep, mlp_tp=tp, dp=ep * tp, tp=tp, attn_tp=1, cp=1)
    group = ty.ExpertGroup.of_model(world, config, MODEL, max(TOKENS), dtype=str(dtype).removeprefix("torch."), device="cuda", sm_budget=16,
                                    timeout_ms=20_000, **options)
    full, found = full_weights(dtype), ty.MoeWeights()
    for name, array in full.items():
        if name in ("w13", "w2"):
            placed = name, MODEL.shape, group.placement(EXPERTS), group.world.rank
            array = ty.weights.cut(array, ty.weights.expert_shard(*placed)).view(ty.weights.local_shape(*placed))
        setattr(found, name, None if array is None else array.cuda())
    return ty.MoeLayer(group, found, MODEL.gate)


def test_a_dense_layer_cut_over_ranks():
    """Rows, and the gradient of rows, as torch has them of whole weights; gradients of weights are the shards' of all tokens."""
    full = full_weights(torch.float32)
    x = [torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(70 + rank)) for rank, tokens in enumerate(TOKENS[:2])]
    d_out = [torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(80 + rank)) for rank, tokens in enumerate(TOKENS[:2])]
    w13, w2, gate = (tensor.clone().requires_grad_() for tensor in (full.shared_w13, full.shared_w2, full.shared_gate))
    rows = [tensor.clone().requires_grad_() for tensor in x]
    expected = [feed_forward(mine, w13[0], w2[0]) * torch.sigmoid(mine @ gate.T) for mine in rows]
    sum((out * d).sum() for out, d in zip(expected, d_out)).backward()

    def body(world):
        gpu_of(world)
        config = ty.parallel.solve(device_count=2, ep=2, mlp_tp=1, dp=2, tp=1, attn_tp=1, cp=1)
        group = ty.ExpertGroup.of_model(world, config, MODEL, max(TOKENS), device="cuda", sm_budget=16, gradients=True, dense_tp=2, timeout_ms=20_000)

        def cut(name, tensor):
            placed = name, MODEL.shared_shape, ty.Placement.tensor_parallel(1, 1, 2), group.dense_rank
            return ty.weights.cut(tensor, ty.weights.expert_shard(*placed)).view(ty.weights.local_shape(*placed))

        layer = ty.DenseLayer(group, cut("w13", full.shared_w13).cuda(), cut("w2", full.shared_w2).cuda(), gate=full.shared_gate.cuda())
        mine, d_mine, saved = x[world.rank].cuda(), d_out[world.rank].cuda(), layer.new_activations()
        torch.cuda.synchronize()
        world.barrier()
        out = layer(mine, saved=saved)
        d_x, gradients = layer.backward(mine, d_mine, saved)
        torch.testing.assert_close(out.cpu(), expected[world.rank].detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(d_x.cpu(), rows[world.rank].grad, rtol=1e-4, atol=1e-4)
        for name, whole in (("w13", w13.grad), ("w2", w2.grad)):
            torch.testing.assert_close(gradients[name].cpu(), cut(name, whole), rtol=1e-4, atol=1e-4)
        group.check()
        world.barrier()
        return gradients["gate"].cpu()

    torch.testing.assert_close(sum(on_ranks(body, 2)), gate.grad, rtol=1e-4, atol=1e-4)



def rows(rank, dtype, seed=0):
    return torch.randn(TOKENS[rank], HIDDEN, generator=torch.Generator().manual_seed(10 * seed + rank)).to(dtype)


def close(found, expected, tolerance):
    expected = expected.double()
    if len(expected):
        error = float((found.cpu().double() - expected).abs().max() / expected.abs().max())
        assert error < tolerance, f"relative error {error:.2e}"


def settle(world):
    """Before a rank lets go of its memory, which waits for kernels of all ranks on its GPU, while others have calls to make."""
    torch.cuda.current_stream().synchronize()
    world.barrier()


def on_gpus(rank_main, ranks, on_one=2):
    """So many ranks on a GPU at most: streams of more would share its hardware queues, and kernels wait for each other. torch makes 32 streams
    on each GPU by itself, as many as there are queues: with shards, which have more streams and waits, two ranks on a GPU have met in one."""
    if ranks > on_one * torch.cuda.device_count():
        pytest.skip(f"{ranks} ranks need {ranks // on_one} GPUs")
    on_ranks(rank_main, ranks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ep, tp, expert_tp", [(1, 1, "virtual"), (2, 1, "virtual"), (4, 1, "virtual"), (2, 2, "virtual"), (2, 2, "gathered"),
                                               (1, 2, "gathered"), (1, 4, "gathered")])
def test_the_answer_of_one_process(ep, tp, expert_tp, dtype):
    def rank_main(world):
        layer = make_layer(world, ep, tp, dtype, expert_tp=expert_tp)
        x = rows(world.rank, dtype).cuda()
        out, logits = torch.empty_like(x), torch.empty(len(x), EXPERTS, device="cuda")
        world.barrier()  # nobody allocates any more
        for seed, mode in enumerate(["throughput", "latency", "throughput"]):
            x.copy_(rows(world.rank, dtype, seed))
            assert layer(x, out, mode=mode, logits=logits) is out
            torch.cuda.current_stream().synchronize()  # a copy to pageable memory behind kernels that wait keeps others from launching theirs
            layer.group.check()  # else what a failed step has left alone would be looked at
            expected, expected_logits = by_hand(rows(world.rank, dtype, seed), full_weights(dtype))
            close(out, expected, DTYPES[dtype])
            close(logits, expected_logits, 1e-5)
        settle(world)
        layer.group.check()

    on_gpus(rank_main, ep * tp, on_one=1 if tp > 1 else 2)


def test_a_graph_follows_its_rows():
    def rank_main(world):
        layer = make_layer(world, 2, 1, torch.bfloat16)
        layer.warm_up([max(TOKENS)])
        x = rows(world.rank, torch.bfloat16).cuda()
        graph, out = captured(world, lambda: layer(x, mode="latency"))
        for seed in range(8):
            x.copy_(rows(world.rank, torch.bfloat16, seed))
            graph.replay()
            close(out, by_hand(rows(world.rank, torch.bfloat16, seed), full_weights(torch.bfloat16))[0], 2e-2)
        settle(world)

    on_gpus(rank_main, 2)


def test_work_is_on_the_current_stream():
    def rank_main(world):
        layer = make_layer(world, 2, 1, torch.float32)
        x = torch.zeros(TOKENS[world.rank], HIDDEN, device="cuda")
        late, out = torch.zeros_like(x), torch.empty_like(x)
        torch.cuda._sleep(1)
        torch.cuda.synchronize()
        world.barrier()  # nobody allocates any more
        for seed in range(4):
            late.copy_(rows(world.rank, torch.float32, seed))
            torch.cuda.current_stream().synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(2_000_000)
                x.copy_(late)
                layer(x, out)
                close(out, by_hand(rows(world.rank, torch.float32, seed), full_weights(torch.float32))[0], 1e-5)
        settle(world)

    on_gpus(rank_main, 2)


def test_says_what_does_not_fit():
    def rank_main(world):
        layer = make_layer(world, 1, 1, torch.float32)
        x = rows(0, torch.float32).cuda()
        for wrong, text in ((x.cpu(), "take torch tensors on cuda"), (np.zeros((2, HIDDEN), np.float32), "NumPy array"),
                            (x.bfloat16(), "rows and weights are of one dtype"), (x.repeat(2, 1), "at most 5 tokens")):
            with pytest.raises(ty.UsageError, match=text):
                layer(wrong)
        with pytest.raises(ty.UsageError, match="without gradients"):
            layer(x, saved=ty.Activations())
        module = tyt.MoeLayer(layer.group, ty.MoeWeights(*(value for _, value in layer.weights.items())), MODEL.gate)
        with pytest.raises(ty.UsageError, match="gradients=True"):
            module(x)
        with torch.no_grad():
            out, gated = module(x, with_routing=True)
        close(out, by_hand(x.cpu(), full_weights(torch.float32))[0], 1e-5)
        assert gated.topk_ids.shape == (len(x), TOP_K)

    on_gpus(rank_main, 1)


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="float8 experts need a Hopper GPU")
@pytest.mark.parametrize("ep, tp", [(1, 1), (2, 1), (2, 2)])
def test_fp8_experts_of_a_checkpoint(ep, tp, tmp_path):
    """Within the rounding of rows and activations to fp8: 2.7 % of each number in the mean square, 2.7 % x sqrt(3) of the sums, and half as much again."""
    full = {name: torch.from_numpy(array).double() for name, array in fp8_checkpoint(tmp_path, FP8_MODEL)[0].items()}

    def rank_main(world):
        gpu_of(world)
        config = ty.parallel.solve(device_count=ep * tp, ep=ep, mlp_tp=tp, dp=ep * tp, tp=tp, attn_tp=1, cp=1)
        group = ty.ExpertGroup.of_model(world, config, FP8_MODEL, 8, dtype="bfloat16", device="cuda", sm_budget=16, timeout_ms=20_000)
        layer = tyt.MoeLayer.from_checkpoint(group, tmp_path, 4, FP8_MODEL, dtype="bfloat16", keep_fp8=True)
        assert layer.w13.dtype == torch.float8_e4m3fn and layer.w13.is_cuda and layer.w13_scale.is_cuda
        x = torch.randn(8 - 3 * (world.rank % 3), 256, generator=torch.Generator().manual_seed(world.rank)).bfloat16()
        on_gpu = x.cuda()
        world.barrier()  # nobody allocates any more
        for mode in ("throughput", "latency"):
            with torch.no_grad():
                out, gated = layer(on_gpu, mode=mode, with_routing=True)
            rows = x.double()
            expected = feed_forward(rows, full["shared_w13"][0], full["shared_w2"][0])
            for t, (ids, weights) in enumerate(zip(gated.topk_ids, gated.topk_weights)):
                expected[t] += sum(float(w) * feed_forward(rows[t], full["w13"][e], full["w2"][e]) for e, w in zip(ids.tolist(), weights))
            error = float((out.cpu().double() - expected).norm() / expected.norm())
            assert error < 0.07, f"relative error {error:.2e}"
        settle(world)
        group.check()

    on_gpus(rank_main, ep * tp, on_one=1 if tp > 1 else 2)
