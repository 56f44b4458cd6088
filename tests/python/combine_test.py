"""Combine, its options and the backward pair against the reference."""
import numpy as np
import pytest

import tokenyard as ty
from dispatch_test import inputs
from support import DTYPES, FRAMEWORKS, TOP_K, expert, is_of, make, make_exchange, numbers, on_ranks, scenario


def computed(out, rank, dtype, framework):
    """Rows of an expert layout after their experts."""
    rows = numbers(out.rows, dtype).copy()
    offsets = numbers(out.expert_offsets)
    for local in range(len(offsets) - 1):
        rows[offsets[local]:offsets[local + 1]] = expert(rank, local, rows[offsets[local]:offsets[local + 1]])
    return make(rows, dtype, framework)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("weighting", ["none", "at_input", "at_expert", "at_source"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weightings(dtype, weighting, framework):
    reference, placement = scenario(20)
    other_weights = [w[::-1] for w in reference.weights]
    weights = {"at_expert": reference.weights, "at_source": other_weights}.get(weighting)
    expected = reference.combine(expert, weights)

    def rank_main(world):
        exchange = make_exchange(world, placement, dtype)
        out = exchange.dispatch(*inputs(reference, world.rank, dtype, framework), layout="expert_major")
        given = {"source_weights": make(other_weights[world.rank], "float32", framework)} if weighting == "at_source" else {}
        sums = exchange.combine(computed(out, world.rank, dtype, framework), out.handle, weighting=weighting, **given)
        assert is_of(sums, framework) and sums.dtype == make([0.0], dtype, framework).dtype
        np.testing.assert_array_equal(numbers(sums, dtype), expected[world.rank])

    on_ranks(rank_main)


@pytest.mark.parametrize("options", [{"order": "topk"}, {"fold": False}, {"fold": False, "order": "topk"}])
def test_orders_and_unfolded(options):
    reference, placement = scenario(21)
    expected = reference.combine(expert, reference.weights)

    def rank_main(world):
        exchange = make_exchange(world, placement, unfolded=True)
        out = exchange.dispatch(*inputs(reference, world.rank, "float32", "numpy"), layout="expert_major")
        sums = exchange.combine(computed(out, world.rank, "float32", "numpy"), out.handle, weighting="at_expert", **options)
        np.testing.assert_array_equal(sums, expected[world.rank])

    on_ranks(rank_main)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("biases", [1, 2])
def test_bias_and_out(biases, framework):
    reference, placement = scenario(22)
    expected = reference.combine(expert)

    def rank_main(world):
        exchange = make_exchange(world, placement)
        out = exchange.dispatch(*inputs(reference, world.rank, "float32", framework), layout="expert_major")
        bias = [make(np.full_like(reference.x[world.rank], 3.0 + i), "float32", framework) for i in range(biases)]
        into = make(np.zeros_like(reference.x[world.rank]), "float64", framework)
        sums = exchange.combine(computed(out, world.rank, "float32", framework), out.handle, bias=bias[0] if biases == 1 else bias, out=into)
        assert sums is into
        np.testing.assert_array_equal(numbers(into), expected[world.rank] + sum(3.0 + i for i in range(biases)))

    on_ranks(rank_main)


@pytest.mark.parametrize("mode", ["throughput", "latency"])
def test_folded_by_the_caller(mode):
    """token_major and rank_slots: one row per token, weights come back summed."""
    reference, placement = scenario(23)
    expected = reference.combine(expert, reference.weights)
    layout = "token_major" if mode == "throughput" else "rank_slots"

    def rank_main(world):
        exchange = make_exchange(world, placement, mode=mode)
        out = exchange.dispatch(*inputs(reference, world.rank, "float32", "numpy"), layout=layout)
        ids, weights = out.local_ids, out.row_weights
        folded = np.zeros(out.rows.shape, np.float32)
        for at in np.ndindex(ids.shape):
            if ids[at] >= 0:
                folded[at[:-1]] += weights[at] * expert(world.rank, ids[at], out.rows[at[:-1]])
        sums, back = exchange.combine(folded, out.handle, row_weights=np.where(ids >= 0, weights, 0).astype(np.float32))
        np.testing.assert_array_equal(sums, expected[world.rank])
        np.testing.assert_array_equal(back, np.where(reference.ids[world.rank] >= 0, reference.weights[world.rank], 0))

    on_ranks(rank_main)


def test_reduction_groups_give_the_same_exact_sums():
    reference, placement = scenario(24)
    expected = reference.combine(expert)

    def rank_main(world):
        exchange = make_exchange(world, placement, reduction_groups=[0, 0, 1])
        out = exchange.dispatch(*inputs(reference, world.rank, "float32", "numpy"), layout="expert_major")
        np.testing.assert_array_equal(exchange.combine(computed(out, world.rank, "float32", "numpy"), out.handle), expected[world.rank])

    on_ranks(rank_main)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_expert_rows_need_no_copy(framework):
    reference, placement = scenario(25)
    expected = reference.combine(lambda rank, local, row: row)

    def rank_main(world):
        exchange = make_exchange(world, placement, expert_rows=True)
        x, ids, weights = inputs(reference, world.rank, "float32", framework)
        out = exchange.dispatch(x, ids, weights)
        memory = exchange.expert_rows(out.handle, like=x)
        assert is_of(memory, framework)
        times = (numbers(out.local_ids) >= 0).sum(1, keepdims=True)
        memory[:] = make(numbers(out.rows) * times, "float32", framework)
        np.testing.assert_array_equal(numbers(exchange.combine(memory, out.handle)), expected[world.rank])

    on_ranks(rank_main)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("weighting", ["none", "at_expert", "at_source"])
def test_backward_pair(weighting, framework):
    """The gradients of sum(combine(f(dispatch(x, w)))) for a random upstream gradient, in closed form."""
    reference, placement = scenario(26)
    rng = np.random.default_rng(26)
    upstream = [rng.integers(-2, 3, x.shape).astype(np.float32) for x in reference.x]
    weighed = weighting != "none"

    def rank_main(world):
        rank = world.rank
        exchange = make_exchange(world, placement)
        x, ids, weights = inputs(reference, rank, "float32", framework)
        out = exchange.dispatch(x, ids, weights, layout="expert_major")
        y = computed(out, rank, "float32", framework)
        given = {"source_weights": weights} if weighting == "at_source" else {}
        grad_y, grad_weights = exchange.combine_backward(out.handle, make(upstream[rank], "float32", framework), y, weighting=weighting, **given)
        # grad_y[row] = w * upstream[source, token]
        for i, (s, t, k) in enumerate(reference.expert_major(rank)["slots"]):
            factor = reference.weights[s][t, k] if weighed else 1.0
            np.testing.assert_array_equal(numbers(grad_y.rows)[i], factor * upstream[s][t])
        if weighed:
            owners = reference.owners
            expected = [[0.0 if e < 0 else sum(upstream[rank][t] @ expert(*owner, reference.x[rank][t]) for owner in owners(e, rank, t))
                         for e in row] for t, row in enumerate(reference.ids[rank])]
            np.testing.assert_array_equal(numbers(grad_weights), np.reshape(expected, (-1, TOP_K)))
        else:
            assert grad_weights is None
        # through the experts (diagonal), and back to x; the weights' gradient of dispatch returns what is given per row
        grad_rows = computed(type("Rows", (), {"rows": grad_y.rows, "expert_offsets": out.expert_offsets}), rank, "float32", framework)
        per_row = make([float(s + k) for s, t, k in reference.expert_major(rank)["slots"]], "float32", framework)
        grad_x, grad_topk = exchange.dispatch_backward(out.handle, grad_rows, per_row)
        factors = reference.weights if weighed else [np.ones_like(w) for w in reference.weights]
        expected_x = np.zeros_like(reference.x[rank])
        for t, row in enumerate(reference.ids[rank]):
            for k, e in enumerate(row):
                for owner in ([] if e < 0 else reference.owners(e, rank, t)):
                    expected_x[t] += factors[rank][t, k] * expert(*owner, upstream[rank][t])
        np.testing.assert_array_equal(numbers(grad_x), expected_x)
        expected_topk = np.where(reference.ids[rank] >= 0, rank + np.arange(TOP_K), 0)
        np.testing.assert_array_equal(numbers(grad_topk), expected_topk)

    on_ranks(rank_main)


def test_combine_dtype_wider_than_dispatch():
    reference, placement = scenario(27)
    expected = reference.combine(lambda rank, local, row: row)

    def rank_main(world):
        exchange = make_exchange(world, placement, "bfloat16", combine_dtype="float32")
        out = exchange.dispatch(*inputs(reference, world.rank, "bfloat16", "numpy"), layout="expert_major")
        sums = exchange.combine(numbers(out.rows, "bfloat16").astype(np.float32), out.handle)
        assert sums.dtype == np.float32
        np.testing.assert_array_equal(sums, expected[world.rank])
        with pytest.raises(ty.UsageError, match=r"rows of y are 128 bytes; expected a multiple of 16 up to max_row_bytes = 64"):
            exchange.combine(numbers(out.rows, "bfloat16"), out.handle)

    on_ranks(rank_main)
