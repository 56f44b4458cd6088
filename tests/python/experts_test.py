"""Grouped products and the gated feed-forward against plain ones in float64, in every layout."""
import numpy as np
import pytest

import tokenyard as ty
from support import FRAMEWORKS, is_of, make, numbers, on_ranks, torch

COUNTS, HIDDEN, WIDTH = [3, 0, 5, 1], 12, 10
EXPERTS = len(COUNTS)
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}


def random(*shape, seed=0):
    return np.random.default_rng(seed).integers(-64, 65, shape) / 64.0  # exact in every type


def silu(gate):
    return gate / (1 + np.exp(-gate))


def by_hand(row, w13, w2, w13_bias=0, w2_bias=0, clamped=False):
    gate, up = np.einsum("pik,k->pi", w13, row) + w13_bias
    if clamped:
        gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
        return w2 @ (gate / (1 + np.exp(-1.702 * gate)) * (up + 1)) + w2_bias
    return w2 @ (silu(gate) * up) + w2_bias


def close(found, expected, dtype):
    np.testing.assert_allclose(numbers(found, dtype), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_of_dense_groups(framework, dtype):
    x, w, bias = random(9, HIDDEN), random(EXPERTS, 7, HIDDEN, seed=1), random(EXPERTS, 7, seed=2)
    expert = np.repeat(np.arange(EXPERTS), COUNTS)
    expected = np.einsum("pk,pmk->pm", x, w[expert]) + bias[expert]
    groups = ty.RowGroups.of_counts(COUNTS)
    found = ty.grouped_gemm(*(make(a, dtype, framework) if not isinstance(a, ty.RowGroups) else a for a in (x, groups, w, bias)))
    assert is_of(found, framework) and found.dtype == make(x, dtype, framework).dtype
    close(found, expected, dtype)
    close(ty.grouped_gemm(make(x, dtype, framework), groups, make(w, dtype, framework)), expected - bias[expert], dtype)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_padding_is_not_read_and_is_zero(framework):
    x, w = random(14, HIDDEN), random(EXPERTS, 7, HIDDEN, seed=1)
    groups = ty.RowGroups.of_offsets(np.array(COUNTS, np.int32), np.array([0, 4, 6, 12, 14], np.int32))
    is_row = np.concatenate([np.arange(4) < 3, [False] * 2, np.arange(6) < 5, [True, False]])
    x[~is_row] = np.nan
    found = numbers(ty.grouped_gemm(make(x, "float32", framework), groups, make(w, "float32", framework)))
    assert groups.has_padding() and (groups.places, groups.begins, groups.counts) == (14, [0, 4, 6, 12], COUNTS)
    np.testing.assert_allclose(found[is_row], np.einsum("pk,pmk->pm", x[is_row], w[np.repeat(np.arange(EXPERTS), COUNTS)]), rtol=1e-5, atol=1e-5)
    assert (found[~is_row] == 0).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["silu", "clamped"])
def test_feed_forward_of_gathered_rows(framework, dtype, activation):
    """token_major, by local ids; then folded with weights."""
    ids = np.array([[0, 2], [2, -1], [-1, -1], [3, 0]], np.int32)
    x, weights = 4 * random(4, HIDDEN), random(4, 2, seed=5)
    w13, w2 = random(EXPERTS, 2, WIDTH, HIDDEN, seed=1), random(EXPERTS, HIDDEN, WIDTH, seed=2)
    w13_bias, w2_bias = random(EXPERTS, 2, WIDTH, seed=3), random(EXPERTS, HIDDEN, seed=4)
    expected = np.zeros((4, HIDDEN))
    for token, k in np.argwhere(ids >= 0):
        e = ids[token, k]
        expected[token] += weights[token, k] * by_hand(x[token], w13[e], w2[e], w13_bias[e], w2_bias[e], activation == "clamped")
    groups = ty.RowGroups.gathered(make(ids, "int32", framework), EXPERTS)
    assert groups.rows().tolist() == [0, 3, 0, 1, 3] and groups.is_gathered
    arrays = [make(a, dtype, framework) for a in (x, w13, w2, w13_bias, w2_bias)]
    y = ty.feed_forward(arrays[0], groups, arrays[1], arrays[2], w13_bias=arrays[3], w2_bias=arrays[4], activation=activation)
    close(ty.unpermute(y, groups, make(weights, "float32", framework)), expected, dtype)


@pytest.mark.parametrize("layout", ["token_major", "expert_major", "expert_padded"])
@pytest.mark.parametrize("ep, tp", [(2, 1), (1, 2), (2, 2)])
def test_between_dispatch_and_combine(layout, ep, tp):
    """A whole layer of NumPy arrays, its experts' weights cut by shard maps, against one process."""
    shape = ty.weights.ExpertShape(EXPERTS, HIDDEN, WIDTH)
    placement = ty.parallel.solve(ep=ep, tp=tp, device_count=ep * tp, dp=ep).placement(EXPERTS)
    full = {name: random(*ty.weights.full_shape(name, shape), seed=i).astype(np.float32) for i, name in enumerate(("w13", "w2"))}
    x = random(5, HIDDEN, seed=9).astype(np.float32)
    ids = np.array([[0, 1], [3, -1], [2, 3], [-1, -1], [1, 2]])
    weights = random(5, 2, seed=8).astype(np.float32)

    def rank_main(world):
        mine = {name: ty.weights.cut(array, ty.weights.expert_shard(name, shape, placement, world.rank))
                .reshape(ty.weights.local_shape(name, shape, placement, world.rank)) for name, array in full.items()}
        exchange = ty.Exchange(world, placement, hidden_size=HIDDEN, top_k=2, max_tokens_per_rank=5, dtype="float32", timeout_ms=20_000)
        alignment = {"alignment": 4} if layout == "expert_major" else {}
        received = exchange.dispatch(x, ids, weights, layout=layout, **alignment)
        groups = ty.RowGroups.of(received, len(placement.local_experts(world.rank)))
        y = ty.feed_forward(received.rows, groups, mine["w13"], mine["w2"])
        if groups.is_gathered:
            return exchange.combine(ty.unpermute(y, groups, received.row_weights), received.handle)
        return exchange.combine(y.reshape(received.rows.shape), received.handle, weighting="at_expert")

    expected = np.zeros((5, HIDDEN))
    for token, k in np.argwhere(ids >= 0):
        e = ids[token, k]
        expected[token] += weights[token, k] * by_hand(x[token].astype(float), full["w13"][e], full["w2"][e])
    for out in on_ranks(rank_main, ep * tp):
        close(out, expected, "float32")


@pytest.mark.parametrize("call, text", [
    (lambda g: ty.grouped_gemm(np.zeros((9, 4), np.float32), g, np.zeros((4, 5), np.float32)), r"w has the shape \[4, 5\]; expected \[L,M,K\]"),
    (lambda g: ty.grouped_gemm(np.zeros((9, 4), np.float32), g, np.zeros((4, 5, 3), np.float32)), "w is"),
    (lambda g: ty.grouped_gemm(np.zeros(9, np.float32), g, np.zeros((4, 5, 3), np.float32)), r"x has the shape \[9\]"),
    (lambda g: ty.grouped_gemm(np.zeros((9, 4), np.float64), g, np.zeros((4, 5, 4), np.float64)), "float64"),
    (lambda g: ty.feed_forward(np.zeros((9, 4), np.float32), g, *[np.zeros((4, 2, 3, 4), np.float32), np.zeros((4, 4, 3), np.float32)], activation="relu"), "activation relu"),
    (lambda g: ty.unpermute(np.zeros((9, 4), np.float32), g), "these rows are their places already"),
    (lambda g: ty.RowGroups.gathered(np.array([[7]], np.int32), 4), "local_ids has 7"),
])
def test_errors(call, text):
    with pytest.raises(ty.UsageError, match=text):
        call(ty.RowGroups.of_counts(COUNTS))


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_gradients_come_by_themselves():
    """ty's own functions are differentiable for tensors that want it, and keep nothing for others."""
    x, w = torch.ones(9, 4, requires_grad=True), torch.ones(EXPERTS, 5, 4)
    groups = ty.RowGroups.of_counts(COUNTS)
    assert ty.grouped_gemm(x.detach(), groups, w).grad_fn is None
    ty.grouped_gemm(x, groups, w).sum().backward()
    assert torch.equal(x.grad, torch.full((9, 4), 5.0))


def float8_weights(shape, seed):
    """([.., M, K] as uint8, scales of blocks of 128 x 128, the values in float32)"""
    rng = np.random.default_rng(seed)
    q = ty.quantise(rng.normal(size=(int(np.prod(shape[:-1])), shape[-1])).astype(np.float32))[0].reshape(shape)
    scales = rng.uniform(0.5e-3, 2e-3, (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))).astype(np.float32)
    ones = np.ones((int(np.prod(shape[:-1])), -(-shape[-1] // 128)), np.float32)
    values = ty.dequantise(q.reshape(-1, shape[-1]), ones, "float32").reshape(shape)
    return q, scales, values * scales.repeat(128, -2).repeat(128, -1)[..., :shape[-2], :shape[-1]]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_float8_weights_are_widened(framework):
    groups, x = ty.RowGroups.of_counts([3, 0, 2]), make(random(5, 144), "float32", framework)
    (w13, w13_scale, wide13), (w2, w2_scale, wide2) = float8_weights((3, 2, 128, 144), 1), float8_weights((3, 144, 128), 2)
    given = [make(a, dtype, framework) for a, dtype in ((w13, "uint8"), (w2, "uint8"), (w13_scale, "float32"), (w2_scale, "float32"))]
    found = ty.feed_forward(x, groups, *given[:2], w13_scale=given[2], w2_scale=given[3])
    assert is_of(found, framework)
    np.testing.assert_array_equal(numbers(found), numbers(ty.feed_forward(x, groups, make(wide13, "float32", framework), make(wide2, "float32", framework))))
    for wrong, text in (({"w13_scale": given[2]}, "w2_scale is absent"), ({"x_scales": given[2]}, "x_scales without w13_scale"),
                        ({"w13_scale": given[2], "w2_scale": given[3], "x_scales": make(np.ones((5, 2)), "float32", framework)}, "float8 rows on GPUs alone")):
        with pytest.raises(ty.UsageError, match=text):
            ty.feed_forward(make(np.zeros((5, 144)), "uint8", framework), groups, *given[:2], **wrong)
    for scales, text in (({"w_scales": given[2]}, "x_scales are absent"), ({"x_scales": given[2], "w_scales": given[2]}, "x is on the CPU")):
        with pytest.raises(ty.UsageError, match=text):
            ty.grouped_gemm(x, groups, given[1], **scales)
