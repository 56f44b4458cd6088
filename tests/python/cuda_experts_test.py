"""Grouped products and the feed-forward of CUDA tensors: as torch computes them expert by expert, within rounding, with gradients, without waiting for the GPU."""
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import tokenyard as ty  # noqa: E402
import tokenyard.torch as tyt  # noqa: E402
from experts_test import float8_weights  # noqa: E402
from torch_experts_test import COUNTS, EXPERTS, HIDDEN, LAYOUTS, LIMITS, TOLERANCE, WIDTH, feed_forward_of, layout_of, plain, product_of, random  # noqa: E402


def on_gpu(layout):
    """The groups of a layout, made of tensors on the GPU."""
    if layout == "dense":
        offsets = torch.tensor([0, *COUNTS]).cumsum(0)
        return ty.RowGroups.of_offsets(torch.tensor(COUNTS).cuda(), offsets.cuda())
    if layout == "padded":
        return ty.RowGroups.of_offsets(torch.tensor(COUNTS).cuda(), torch.tensor([0, 4, 6, 12, 14]).cuda())
    return ty.RowGroups.gathered(layout_of(layout)[0].local_ids.cuda(), EXPERTS)


def same(ours, theirs, dtype):
    scale = max(1.0, float(theirs.detach().abs().max()))
    torch.testing.assert_close(ours.double().cpu(), theirs.double(), rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype] * scale)


def compare(compute, reference, layout, dtype, born, inputs):
    """Values and gradients of compute(groups, *inputs) and of plain(reference); rows of padding are zero, and NaN in the gradient."""
    groups, _, rows, experts = layout_of(layout)
    gpu_groups = on_gpu(layout) if born == "on_gpu" else groups
    is_row = torch.tensor(rows) >= 0
    gpu_inputs = [None if t is None else t.detach().cuda().requires_grad_() for t in inputs]
    ours, theirs = compute(gpu_groups, *gpu_inputs), plain(inputs[0], rows, experts, reference)
    same(ours[:len(is_row)][is_row.cuda()], theirs[is_row], dtype)
    assert not ours[:len(is_row)][~is_row.cuda()].any() and not ours[len(is_row):].any()
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    upstream[~is_row] = float("nan")
    padded = torch.full(ours.shape, float("nan"), dtype=dtype)
    padded[:len(upstream)] = upstream  # on the GPU gathered rows have as many places as there can be
    ours = torch.autograd.grad(ours, [t for t in gpu_inputs if t is not None], padded.cuda())
    theirs = torch.autograd.grad(theirs, [t for t in inputs if t is not None], upstream.double())
    for a, b in zip(ours, theirs):
        same(a, b, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("born", ["on_gpu", "on_host"])
def test_grouped_gemm(born, layout, dtype):
    count = layout_of(layout)[1]
    inputs = random(count, HIDDEN, seed=1, dtype=dtype), random(EXPERTS, 7, HIDDEN, seed=2, dtype=dtype), random(EXPERTS, 7, seed=3, dtype=dtype)
    compare(lambda groups, x, w, bias: tyt.grouped_gemm(x, groups, w, bias), product_of(*inputs[1:]), layout, dtype, born, inputs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["silu", "clamped"])
def test_feed_forward(activation, layout, dtype):
    biases = (random(EXPERTS, 2, WIDTH, seed=4, dtype=dtype), random(EXPERTS, HIDDEN, seed=5, dtype=dtype)) if activation == "clamped" else (None, None)
    inputs = (random(layout_of(layout)[1], HIDDEN, seed=1, dtype=dtype), random(EXPERTS, 2, WIDTH, HIDDEN, seed=2, dtype=dtype),
              random(EXPERTS, HIDDEN, WIDTH, seed=3, dtype=dtype), *biases)
    compare(lambda groups, x, w13, w2, b13, b2: tyt.feed_forward(x, groups, w13, w2, w13_bias=b13, w2_bias=b2, activation=activation, **LIMITS),
            feed_forward_of(activation, *inputs[1:]), layout, dtype, "on_gpu", inputs)


def test_between_dispatch_and_combine():
    """A layer of one rank whose rows never leave the GPU."""
    x, w13, w2 = torch.randn(12, 64).cuda(), torch.randn(4, 2, 32, 64).cuda() / 8, torch.randn(4, 64, 32).cuda() / 8
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(12)]).cuda()
    exchange = ty.Exchange(ty.World.in_process(1)[0], ty.Placement.uniform(4, 1), hidden_size=64, top_k=2, max_tokens_per_rank=12, dtype="float32", device="cuda")
    received = exchange.dispatch(x, ids, layout="expert_major", sizing="capacity")
    groups = ty.RowGroups.of(received, 4)
    assert groups.table(received.rows)["likely"] == 12 * 2  # what this rank sent, whatever there is room for
    y = exchange.combine(ty.feed_forward(received.rows, groups, w13, w2), received.handle)
    gate, up = torch.einsum("epik,tk->etpi", w13, x).unbind(2)
    each = torch.einsum("ehi,eti->teh", w2, torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(y, each.gather(1, ids[..., None].expand(-1, -1, 64)).sum(1), rtol=1e-4, atol=1e-4)


needs_hopper = pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="float8 products need a Hopper GPU")


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float8_between_dispatch_and_combine(dtype):
    """Rows of a dispatch that quantises are the experts' as they are; without scales rows become float8 on the way, to the same numbers."""
    hidden, width, name = 256, 128, str(dtype).removeprefix("torch.")
    (w13, w13_scale, wide13), (w2, w2_scale, wide2) = float8_weights((4, 2, width, hidden), 1), float8_weights((4, hidden, width), 2)
    weights = [torch.from_numpy(w).cuda().view(torch.float8_e4m3fn) for w in (w13, w2)]
    scales = {"w13_scale": torch.from_numpy(w13_scale).cuda(), "w2_scale": torch.from_numpy(w2_scale).cuda()}
    x, ids = torch.randn(12, hidden, generator=torch.Generator().manual_seed(3)).to(dtype).cuda(), torch.stack([torch.randperm(4)[:2] for _ in range(12)]).cuda()
    exchange = ty.Exchange(ty.World.in_process(1)[0], ty.Placement.uniform(4, 1), hidden_size=hidden, top_k=2, max_tokens_per_rank=12, dtype=name, max_scale_bytes=hidden // 128 * 4, device="cuda")
    received = exchange.dispatch(x, ids, layout="expert_major", sizing="exact", quantise="float32")
    groups = ty.RowGroups.of(received, 4)
    y = ty.feed_forward(received.rows, groups, *weights, x_scales=received.scales, dtype=name, **scales)
    assert y.dtype == dtype
    wide = torch.from_numpy(ty.dequantise(received.rows.view(torch.uint8).cpu().numpy(), received.scales.cpu().numpy(), "float32")).double()
    expert = torch.arange(4).repeat_interleave(received.expert_counts.long().cpu())
    products = torch.einsum("npik,nk->npi", torch.from_numpy(wide13).double()[expert], wide)
    expected = torch.einsum("nhi,ni->nh", torch.from_numpy(wide2).double()[expert], torch.nn.functional.silu(products[:, 0]) * products[:, 1])
    error = (y.double().cpu() - expected).norm() / expected.norm()
    assert error < 4e-2, error  # the activation is rounded to 4 bits
    gate_up = ty.grouped_gemm(received.rows, groups, weights[0].view(4, 2 * width, hidden), dtype=name, x_scales=received.scales,
                              w_scales=scales["w13_scale"].view(4, 2, -1))
    torch.testing.assert_close(gate_up.double().cpu(), products.flatten(1), rtol=1e-2, atol=1e-2 * float(products.abs().max()))
    again = exchange.dispatch(x, ids, layout="expert_major", sizing="exact")
    torch.testing.assert_close(ty.feed_forward(again.rows, ty.RowGroups.of(again, 4), *weights, **scales), y, rtol=0, atol=0)
    with pytest.raises(ty.UsageError, match="go forward alone"):
        ty.feed_forward(x.clone().requires_grad_(), ty.RowGroups.of_counts([12, 0, 0, 0]), *weights, **scales)


def test_errors():
    groups, x = ty.RowGroups.of_counts(COUNTS), torch.ones(9, 4).cuda()
    with pytest.raises(ty.UsageError, match="w is on cpu, and x on cuda:0; move it there"):
        ty.grouped_gemm(x, groups, torch.ones(EXPERTS, 5, 4))
    with pytest.raises(ty.UsageError, match="the numbers of these groups are on a GPU"):
        ty.grouped_gemm(x.cpu(), on_gpu("dense"), torch.ones(EXPERTS, 5, 4))
