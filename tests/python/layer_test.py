"""ty.MoeLayer with arrays: rows, gradients and steps of every kind, against one process in float64."""
import numpy as np
import pytest

import tokenyard as ty
from support import FRAMEWORKS, is_of, make, numbers, on_ranks
from tokenyard import weights as tw

EXPERTS, TOP_K, HIDDEN, WIDTH, SHARED = 6, 2, 12, 8, 4
TOKENS = [5, 0, 3, 4]
MODEL = dict(family="qwen3_moe", num_experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, expert_width=WIDTH, shared_expert_width=SHARED)
LAYOUTS = [(4, 1, "virtual"), (2, 2, "virtual"), (2, 2, "gathered"), (1, 4, "gathered")]


def model():
    return ty.MoeModel(**MODEL, gate=ty.Gate.softmax(TOP_K, renormalise=True))


def full_weights():
    """Of the whole layer, float32."""
    rng = np.random.default_rng(1)

    def draw(*shape):
        return rng.normal(scale=0.5, size=shape).astype(np.float32)

    return ty.MoeWeights(gate_weight=draw(EXPERTS, HIDDEN), w13=draw(EXPERTS, 2, WIDTH, HIDDEN), w2=draw(EXPERTS, HIDDEN, WIDTH),
                         shared_w13=draw(1, 2, SHARED, HIDDEN), shared_w2=draw(1, HIDDEN, SHARED), shared_gate=draw(1, HIDDEN))


def rows(seed, ranks=len(TOKENS)):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(tokens, HIDDEN)).astype(np.float32) for tokens in TOKENS[:ranks]]


def silu(x):
    return x / (1 + np.exp(-x))


def feed_forward(row, w13, w2):
    return w2 @ (silu(w13[0] @ row) * (w13[1] @ row))


def by_hand(x, weights, mask=None, given_ids=None):
    """(out, ids) token by token."""
    w = ty.MoeWeights(*(None if a is None else np.asarray(a, np.float64) for _, a in weights.items()))
    out, chosen = np.zeros(x.shape), np.full((len(x), TOP_K), -1)
    for t, row in enumerate(np.asarray(x, np.float64)):
        out[t] = feed_forward(row, w.shared_w13[0], w.shared_w2[0]) / (1 + np.exp(-w.shared_gate[0] @ row))
        if mask is not None and not mask[t]:
            continue
        logits = w.gate_weight @ row
        chosen[t] = np.argsort(-logits)[:TOP_K] if given_ids is None else given_ids[t]
        p = np.exp(logits[chosen[t]] - logits[chosen[t]].max())
        for e, weight in zip(chosen[t], p / p.sum()):
            out[t] += weight * feed_forward(row, w.w13[e], w.w2[e])
    return out, chosen


def group_of(world, layout, **options):
    ep, tp, expert_tp = layout
    config = ty.parallel.solve(device_count=ep * tp, ep=ep, mlp_tp=tp, dp=ep * tp, tp=tp, attn_tp=1)
    return ty.ExpertGroup.of_model(world, config, model(), max(TOKENS), expert_tp=expert_tp, timeout_ms=20_000, **options)


def local_weights(group, framework="numpy", dtype="float32"):
    """This rank's part of full_weights()."""
    full, m = full_weights(), model()
    placement, dense = group.placement(EXPERTS), ty.Placement.tensor_parallel(1, 1, group.dense_tp)
    parts = {}
    for name, array in full.items():
        if name in ("w13", "w2"):
            array = tw.cut(array, tw.expert_shard(name, m.shape, placement, group.world.rank)).reshape(tw.local_shape(name, m.shape, placement, group.world.rank))
        elif name in ("shared_w13", "shared_w2"):
            which = name.removeprefix("shared_")
            array = tw.cut(array, tw.expert_shard(which, m.shared_shape, dense, group.dense_rank)).reshape(tw.local_shape(which, m.shared_shape, dense, group.dense_rank))
        parts[name] = None if array is None else make(array, dtype, framework)
    return ty.MoeWeights(**parts)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dense_tp", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_forward(layout, dense_tp, framework):
    x = rows(2)

    def rank_main(world):
        group = group_of(world, layout, dense_tp=dense_tp)
        layer = ty.MoeLayer(group, local_weights(group, framework), model().gate)
        layer.warm_up([0, 2])
        mine, saved = make(x[world.rank], "float32", framework), ty.Activations()
        out = layer(mine, saved=saved)
        latency = layer(mine, mode=ty.mode_for_step(max(TOKENS)))
        assert is_of(out, framework) and np.array_equal(numbers(out), numbers(latency))
        in_place = make(x[world.rank], "float32", framework)
        assert layer(in_place, out=in_place) is in_place and np.array_equal(numbers(in_place), numbers(out))
        assert np.array_equal(numbers(mine), x[world.rank])
        assert (group.has_exchange, group.ep_rank, group.tp_rank) == (layout[0] > 1, *divmod(world.rank, layout[1]))
        return numbers(out), numbers(saved.routing.topk_ids), numbers(saved.logits)

    for mine, (out, ids, logits) in zip(x, on_ranks(rank_main, 4)):
        expected, chosen = by_hand(mine, full_weights())
        np.testing.assert_array_equal(ids, chosen)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(logits, mine @ full_weights().gate_weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_by_small_steps(layout):
    """Along random directions of rows and of every weight: <gradient, direction> is the change of <out, upstream>."""
    x, upstream, direction = rows(2), rows(3), rows(4)

    def rank_main(world):
        group = group_of(world, layout)
        layer = ty.MoeLayer(group, local_weights(group), model().gate)
        saved = ty.Activations()
        layer(x[world.rank], saved=saved)
        d_x, gradients = layer.backward(x[world.rank], upstream[world.rank], saved)
        again = layer.backward(x[world.rank], upstream[world.rank], saved, gradients)[1]
        assert again is gradients and gradients.selection_bias is None
        return d_x, {name: g / 2 for name, g in gradients.items() if g is not None}

    found = on_ranks(rank_main, 4)
    full, eps = full_weights(), 1e-6

    def value(weights, of):
        return sum((by_hand(one, weights)[0] * up).sum() for one, up in zip(of, upstream))

    moved = [[a.astype(np.float64) + sign * eps * d for a, d in zip(x, direction)] for sign in (1.0, -1.0)]
    slope = (value(full, moved[0]) - value(full, moved[1])) / (2 * eps)
    assert sum((d_x * d).sum() for (d_x, _), d in zip(found, direction)) == pytest.approx(slope, rel=1e-4, abs=1e-3)
    placement = ty.Placement.tensor_parallel(EXPERTS, *layout[:2])
    for name, array in full.items():
        if array is None:
            continue
        along, total = np.random.default_rng(7).normal(size=array.shape), 0.0
        for rank, (_, gradients) in enumerate(found):
            mine = tw.cut(along, tw.expert_shard(name, model().shape, placement, rank)) if name in ("w13", "w2") else along
            total += float((gradients[name].reshape(-1) * mine.reshape(-1)).sum())
        values = []
        for sign in (1.0, -1.0):
            changed = ty.MoeWeights(**{n: (a + sign * eps * along if n == name else a) for n, a in full.items()})  # along is float64
            values.append(value(changed, [one.astype(np.float64) for one in x]))
        assert total == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-4, abs=1e-3), name


def test_masks_and_replay():
    x, ids = rows(2), [np.random.default_rng(5).permuted(np.tile(np.arange(EXPERTS), (t, 1)), axis=1)[:, :TOP_K] for t in TOKENS]
    masks = [np.arange(t) % 2 == 0 for t in TOKENS]

    def rank_main(world):
        group = group_of(world, (2, 2, "virtual"))
        layer = ty.MoeLayer(group, local_weights(group), model().gate)
        return layer(x[world.rank], mask=masks[world.rank]), layer(x[world.rank], given_ids=ids[world.rank])

    for rank, (masked, replayed) in enumerate(on_ranks(rank_main, 4)):
        np.testing.assert_allclose(masked, by_hand(x[rank], full_weights(), mask=masks[rank])[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(replayed, by_hand(x[rank], full_weights(), given_ids=ids[rank])[0], rtol=1e-5, atol=1e-5)


def test_all_ranks_have_the_same_tokens():
    """ep = 1 with tensor parallelism: the whole result on every rank, or its slice."""
    x = rows(2)[0]

    def rank_main(world):
        group = group_of(world, (1, 4, "gathered"), same_tokens=True)
        layer = ty.MoeLayer(group, local_weights(group), model().gate)
        return layer(x), layer(x, sliced_out=True)

    expected, _ = by_hand(x, full_weights())
    found = on_ranks(rank_main, 4)
    for out, _ in found:
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert [len(part) for _, part in found] == [2, 1, 1, 1]
    np.testing.assert_array_equal(np.concatenate([part for _, part in found]), found[0][0])


def test_one_exchange_serves_layers_and_micro_batches():
    x = [rows(seed) for seed in (2, 3)]

    def rank_main(world):
        group = group_of(world, (2, 2, "virtual"), trace=True)
        layers = [ty.MoeLayer(group, local_weights(group), model().gate) for _ in range(2)]
        steps = [[ty.Activations() for _ in layers] for _ in x]
        outs, gradients = [], []
        for batch, saved in zip(x, steps):  # both forwards before both backwards
            hidden = layers[0](batch[world.rank], saved=saved[0])
            outs.append((hidden, layers[1](hidden, saved=saved[1])))
        for batch, saved, (hidden, out) in zip(x, steps, outs):
            d_hidden, _ = layers[1].backward(hidden, np.ones_like(out), saved[1])
            gradients.append(layers[0].backward(batch[world.rank], d_hidden, saved[0])[0])
        alone = []
        for batch in x:
            saved = [ty.Activations() for _ in layers]
            hidden = layers[0](batch[world.rank], saved=saved[0])
            out = layers[1](hidden, saved=saved[1])
            alone.append(layers[0].backward(batch[world.rank], layers[1].backward(hidden, np.ones_like(out), saved[1])[0], saved[0])[0])
        assert all(np.array_equal(a, b) for a, b in zip(gradients, alone))
        assert {span.phase for span in group.take_spans()} >= {"route", "dispatch", "experts", "combine"} and not group.take_spans()
        return outs

    for rank, outs in enumerate(on_ranks(rank_main, 4)):
        for batch, (hidden, out) in zip(x, outs):
            np.testing.assert_allclose(hidden, by_hand(batch[rank], full_weights())[0], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(out, by_hand(hidden, full_weights())[0], rtol=1e-5, atol=1e-4)


def alone(**options):
    """A layer of one rank."""
    group = group_of(ty.World.in_process(1)[0], (1, 1, "virtual"), **options)
    return group, local_weights(group)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dense_tp", [1, 2])
def test_dense_layers(dense_tp, framework):
    """Against the shared expert of the reference alone, and gradients along random directions."""
    x, upstream, direction, full = rows(2), rows(3), rows(4), full_weights()

    def dense(x, w13, w2, gate):
        return np.array([feed_forward(row, w13[0], w2[0]) / (1 + np.exp(-gate[0] @ row)) for row in x]).reshape(x.shape)

    def rank_main(world):
        group = group_of(world, (4, 1, "virtual"), dense_tp=dense_tp)
        mine = local_weights(group, framework)
        layer = ty.DenseLayer(group if dense_tp > 1 else None, mine.shared_w13, mine.shared_w2, gate=mine.shared_gate)
        saved = layer.new_activations()
        out = layer(make(x[world.rank], "float32", framework), saved=saved)
        assert is_of(out, framework)
        d_x, gradients = layer.backward(make(x[world.rank], "float32", framework), make(upstream[world.rank], "float32", framework), saved)
        return numbers(out), numbers(d_x), {name: numbers(g) for name, g in gradients.items()}

    found, weights, eps = on_ranks(rank_main, 4), (full.shared_w13, full.shared_w2, full.shared_gate), 1e-6
    for rank, (out, d_x, gradients) in enumerate(found):
        np.testing.assert_allclose(out, dense(x[rank], *weights), rtol=1e-5, atol=1e-5)
        values = [(dense(x[rank].astype(np.float64) + sign * eps * direction[rank], *weights) * upstream[rank]).sum() for sign in (1, -1)]
        assert (d_x * direction[rank]).sum() == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-4, abs=1e-3)
        assert gradients.keys() == {"w13", "w2", "gate"}
    along = np.random.default_rng(7).normal(size=full.shared_gate.shape)
    values = [sum((dense(a.astype(np.float64), *weights[:2], full.shared_gate + sign * eps * along) * up).sum() for a, up in zip(x, upstream)) for sign in (1, -1)]
    assert sum((gradients["gate"] * along).sum() for _, _, gradients in found) == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-4, abs=1e-3)


def test_errors():
    group, weights = alone()
    with pytest.raises(ty.UsageError, match="an expert group has no option 'colour'"):
        alone(colour="red")
    with pytest.raises(ty.UsageError, match='expert_tp "sideways"; use virtual or gathered'):
        group_of(ty.World.in_process(1)[0], (1, 1, "sideways"))
    with pytest.raises(ty.UsageError, match="activation relu"):
        ty.MoeLayer(group, weights, model().gate, activation="relu")
    with pytest.raises(ty.UsageError, match="the world has 1 ranks and the configuration 4 devices"):
        group_of(ty.World.in_process(1)[0], (4, 1, "virtual"))
    layer = ty.MoeLayer(group, weights, model().gate)
    with pytest.raises(ty.UsageError, match="x is .2, 5. float32; expected .2, 12."):
        layer(np.zeros((2, 5), np.float32))
    with pytest.raises(ty.UsageError, match="sliced_out without same_tokens"):
        layer(np.zeros((2, HIDDEN), np.float32), sliced_out=True)
    weights.w13 = weights.w13[:, :, :, :5].copy()
    with pytest.raises(ty.UsageError, match="experts.w13"):
        ty.MoeLayer(group, weights, model().gate)
