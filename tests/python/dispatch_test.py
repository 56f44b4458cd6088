"""Every layout, dtype, sizing and framework of dispatch against the reference."""
import numpy as np
import pytest

from support import DTYPES, FRAMEWORKS, TOKENS, TOP_K, is_of, make, make_exchange, numbers, on_ranks, scenario


def inputs(reference, rank, dtype, framework):
    return (make(reference.x[rank], dtype, framework), make(reference.ids[rank], "int64", framework),
            make(reference.weights[rank], "float32", framework))


def check(out, name, expected, framework, dtype=None):
    array = getattr(out, name)
    assert is_of(array, framework)
    shown = numbers(array, dtype)
    expected = np.asarray(expected)
    np.testing.assert_array_equal(shown[:len(expected)], expected.reshape(expected.shape if expected.size else (0, *shown.shape[1:])), err_msg=name)
    return array


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("sizing", ["exact", "capacity"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_major(dtype, sizing, framework):
    reference, placement = scenario()

    def rank_main(world):
        exchange = make_exchange(world, placement, dtype)
        out = exchange.dispatch(*inputs(reference, world.rank, dtype, framework), sizing=sizing, gather_map=True)
        expected = reference.token_major(world.rank)
        count = len(expected["rows"])
        assert out.num_rows == count and out.handle.num_rows == count
        rows = check(out, "rows", expected.pop("rows"), framework, dtype)
        assert rows.shape[0] == (count if sizing == "exact" else len(TOKENS) * max(TOKENS))
        assert rows.dtype == make([0.0], dtype, framework).dtype
        for name, values in {**expected, **reference.gather_map(world.rank)}.items():
            check(out, name, values, framework)
        if sizing == "capacity":
            assert (numbers(out.source_rank)[count:] == -1).all() and (numbers(out.row_weights)[count:] == 0).all()
        assert out.source_k is None and out.present is None and out.scales is None

    on_ranks(rank_main)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("sizing", ["exact", "capacity"])
@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expert_major(dtype, alignment, sizing, framework):
    reference, placement = scenario(2)

    def rank_main(world):
        exchange = make_exchange(world, placement, dtype)
        out = exchange.dispatch(*inputs(reference, world.rank, dtype, framework), layout="expert_major", sizing=sizing,
                                alignment=alignment, zero_padding=True)
        expected = reference.expert_major(world.rank, alignment)
        check(out, "expert_offsets", expected["expert_offsets"], framework)
        check(out, "expert_counts", expected["expert_counts"], framework)
        rows, weights = numbers(out.rows, dtype), numbers(out.row_weights)
        sources = numbers(out.source_rank), numbers(out.source_token), numbers(out.source_k)
        for i, slot in enumerate(expected["slots"]):
            s, t, k = slot or (-1, -1, -1)
            assert tuple(source[i] for source in sources) == (s, t, k)
            assert weights[i] == (reference.weights[s][t, k] if slot else 0)
            np.testing.assert_array_equal(rows[i], reference.x[s][t] if slot else 0)

    on_ranks(rank_main)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("mode", ["throughput", "latency"])
def test_expert_padded(mode, framework):
    reference, placement = scenario(3)

    def rank_main(world):
        exchange = make_exchange(world, placement, "bfloat16", mode=mode)
        out = exchange.dispatch(*inputs(reference, world.rank, "bfloat16", framework), layout="expert_padded", expert_capacity=40)
        assert tuple(out.rows.shape) == (reference.num_local[world.rank], 40, 16)
        rows, ranges = numbers(out.rows, "bfloat16"), numbers(out.ranges)
        check(out, "expert_counts", reference.counts(world.rank), framework)
        for local in range(reference.num_local[world.rank]):
            slots = reference.expert_rows(world.rank, local)
            for i, (s, t, k) in enumerate(slots):
                np.testing.assert_array_equal(rows[local, i], reference.x[s][t])
                assert (numbers(out.source_rank)[local, i], numbers(out.source_token)[local, i], numbers(out.source_k)[local, i]) == (s, t, k)
                assert numbers(out.row_weights)[local, i] == reference.weights[s][t, k]
            begins = [sum(slot[0] < source for slot in slots) for source in range(3)]
            counts = [sum(slot[0] == source for slot in slots) for source in range(3)]
            assert [tuple(r) for r in ranges[local] if r[1]] == [(b, c) for b, c in zip(begins, counts) if c]

    on_ranks(rank_main)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rank_slots(dtype, framework):
    reference, placement = scenario(4)

    def rank_main(world):
        exchange = make_exchange(world, placement, dtype, mode="latency")
        out = exchange.dispatch(*inputs(reference, world.rank, dtype, framework), layout="rank_slots")
        rows, present, ids, weights = (numbers(a) for a in (out.rows, out.present, out.local_ids, out.row_weights))
        expected = set(reference.token_rows(world.rank))
        for s in range(3):
            for t in range(max(TOKENS)):
                assert bool(present[s, t]) == ((s, t) in expected)
                if (s, t) in expected:
                    np.testing.assert_array_equal(rows[s, t], reference.x[s][t])
                    np.testing.assert_array_equal(weights[s, t], reference.weights[s][t])
                    assert list(ids[s, t]) == [reference.local_id(world.rank, s, t, k) for k in range(TOP_K)]
                else:
                    assert (ids[s, t] == -1).all()

    on_ranks(rank_main)


@pytest.mark.parametrize("tokens", [[0, 0, 0], [0, 4, 0], [1, 1, 1]])
def test_no_tokens_anywhere_or_on_some_ranks(tokens):
    reference, placement = scenario(5, tokens)

    def rank_main(world):
        exchange = make_exchange(world, placement)
        out = exchange.dispatch(*inputs(reference, world.rank, "float32", "numpy"))
        expected = reference.token_major(world.rank)
        assert out.num_rows == len(expected["rows"]) and out.rows.shape == (out.num_rows, 16)
        sums = exchange.combine(out.rows, out.handle)
        assert sums.shape == (tokens[world.rank], 16)

    on_ranks(rank_main)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_scales_travel_along(framework):
    reference, placement = scenario(6)

    def rank_main(world):
        exchange = make_exchange(world, placement, max_scale_bytes=8)
        scales = make(np.arange(TOKENS[world.rank] * 2).reshape(-1, 2) + 100 * world.rank, "float32", framework)
        out = exchange.dispatch(*inputs(reference, world.rank, "float32", framework), scales=scales)
        check(out, "scales", np.reshape([[100 * s + 2 * t, 100 * s + 2 * t + 1] for s, t in reference.token_rows(world.rank)], (-1, 2)), framework)

    on_ranks(rank_main)


def test_rows_beyond_capacity_are_dropped_when_asked():
    reference, placement = scenario(7, [9, 9, 9])

    def rank_main(world):
        exchange = make_exchange(world, placement)
        out = exchange.dispatch(*inputs(reference, world.rank, "float32", "numpy"), layout="expert_padded", expert_capacity=3, drop=True)
        counts = reference.counts(world.rank)
        assert list(out.expert_counts) == [min(3, count) for count in counts]
        assert out.handle.dropped == [max(0, count - 3) for count in counts]
        return sum(out.handle.dropped)

    assert sum(on_ranks(rank_main)) > 0


def test_expert_tensor_parallel_placement_sends_to_all_shards():
    reference, _ = scenario(8, [4, 3, 2, 1], experts=4)
    import tokenyard as ty
    placement = ty.Placement.tensor_parallel(num_experts=4, ep=2, tp=2)
    reference.num_local = [2] * 4
    reference.owners = lambda e, source, token: [((e // 2) * 2 + shard, e % 2) for shard in range(2)]

    def rank_main(world):
        exchange = make_exchange(world, placement)
        out = exchange.dispatch(*inputs(reference, world.rank, "float32", "numpy"))
        expected = reference.token_major(world.rank)
        np.testing.assert_array_equal(out.rows, np.reshape(expected["rows"], (-1, 16)))
        np.testing.assert_array_equal(out.local_ids, np.reshape(expected["local_ids"], (-1, TOP_K)))

    on_ranks(rank_main, 4)


@pytest.mark.parametrize("replicas", [1, 2])
def test_replicated_placement_sends_to_the_replica_it_names(replicas):
    reference, _ = scenario(9)
    import tokenyard as ty
    placement = ty.Placement.replicated(7, 3, load=[10, 1, 1, 1, 1, 1, 1], redundant=replicas)
    reference.num_local = [len(placement.local_experts(rank)) for rank in range(3)]

    def owners(e, source, token):
        replica = placement.replicas(e)[placement.replica_for(e, source, token)]
        return [(rank, placement.local_experts(rank).index(e)) for rank in replica.shard_ranks]

    reference.owners = owners

    def rank_main(world):
        exchange = make_exchange(world, placement)
        out = exchange.dispatch(*inputs(reference, world.rank, "float32", "numpy"))
        expected = reference.token_major(world.rank)
        np.testing.assert_array_equal(out.rows, np.reshape(expected["rows"], (-1, 16)))
        assert list(out.expert_counts) == expected["expert_counts"]

    on_ranks(rank_main)


def test_several_placements_on_one_exchange():
    reference, first = scenario(10)
    import tokenyard as ty
    reverse = ty.Placement.custom(3, [[ty.Replica([2 - e % 3])] for e in range(7)])
    reference.num_local = [len(reverse.local_experts(rank)) for rank in range(3)]
    reference.owners = lambda e, source, token: [(2 - e % 3, reverse.local_experts(2 - e % 3).index(e))]

    def rank_main(world):
        exchange = make_exchange(world, [first, reverse])
        given = inputs(reference, world.rank, "float32", "numpy")
        out = exchange.dispatch(*given, placement=reverse)
        assert out.handle.placement == 1
        np.testing.assert_array_equal(out.rows, np.reshape(reference.token_major(world.rank)["rows"], (-1, 16)))
        assert exchange.dispatch(*given, placement=0).handle.placement == 0
        with pytest.raises(ty.UsageError, match="is not registered with this exchange; call add"):
            exchange.dispatch(*given, placement=ty.Placement.uniform(9, 3))

    on_ranks(rank_main)


def test_ranks_as_processes_get_the_same_rows():
    reference, placement = scenario(11)

    def rank_main(world):
        exchange = make_exchange(world, placement)
        assert exchange.transport == "shm"
        out = exchange.dispatch(*inputs(reference, world.rank, "float32", "numpy"))
        np.testing.assert_array_equal(out.rows, np.reshape(reference.token_major(world.rank)["rows"], (-1, 16)))
        return out.num_rows

    assert on_ranks(rank_main, processes=True) == [len(reference.token_rows(rank)) for rank in range(3)]
