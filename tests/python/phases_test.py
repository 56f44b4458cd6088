"""Leases, copies, cached dispatch, started calls."""
import gc
import time

import numpy as np
import pytest

import tokenyard as ty
from dispatch_test import inputs
from support import FRAMEWORKS, HIDDEN, make, make_exchange, numbers, on_ranks, scenario


def test_a_lease_goes_back_with_its_last_array():
    reference, placement = scenario(40)

    def rank_main(world):
        exchange = make_exchange(world, placement, depth=1)
        given = inputs(reference, world.rank, "float32", "numpy")
        rows = exchange.dispatch(*given).rows
        view = rows[:1]
        del rows
        world.barrier()
        with pytest.raises(ty.UsageError, match=r"all 1 receive buffers are held .*release a Received, or raise depth"):
            exchange.dispatch(*given)
        world.barrier()
        del view
        gc.collect()
        with exchange.dispatch(*given) as out:
            assert out.num_rows == len(reference.token_rows(world.rank))
        with pytest.raises(ValueError, match="the rows were released"):
            out.rows
        assert exchange.combine(exchange.dispatch(*given).rows, out.handle).shape == given[0].shape

    on_ranks(rank_main)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("layout", ["token_major", "expert_major"])
def test_copy_out_takes_no_lease(layout, framework):
    reference, placement = scenario(41)

    def rank_main(world):
        exchange = make_exchange(world, placement, depth=1)
        given = inputs(reference, world.rank, "float32", framework)
        first = exchange.dispatch(*given, layout=layout, copy_out=True)
        into = make(np.full((80, HIDDEN), 7.0), "float32", framework)
        second = exchange.dispatch(*given, layout=layout, copy_out=True, out_rows=into)
        count = second.num_rows
        np.testing.assert_array_equal(numbers(into)[:count], numbers(first.rows))
        assert (numbers(into)[count:] == 7).all()
        slots = reference.token_rows(world.rank) if layout == "token_major" else reference.expert_major(world.rank)["slots"]
        np.testing.assert_array_equal(numbers(first.rows), np.reshape([reference.x[s][t] for s, t, *_ in slots], (-1, HIDDEN)))

    on_ranks(rank_main)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("layout", ["token_major", "expert_major"])
def test_cached_dispatch_follows_the_handle(layout, framework):
    reference, placement = scenario(42)

    def rank_main(world):
        exchange = make_exchange(world, placement)
        x, ids, weights = inputs(reference, world.rank, "float32", framework)
        with exchange.dispatch(x, ids, weights, layout=layout) as out:
            before = numbers(out.rows).copy()
        again = exchange.dispatch(x * 2, handle=out.handle, layout=layout)
        np.testing.assert_array_equal(numbers(again.rows), before * 2)
        with pytest.raises(ty.UsageError, match="a cached dispatch follows the handle's routing"):
            exchange.dispatch(x, ids, handle=out.handle)

    on_ranks(rank_main)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_started_calls_overlap_and_finish_in_any_order(framework):
    reference, placement = scenario(43)
    expected = reference.combine(lambda rank, local, row: row)

    def rank_main(world):
        exchange = make_exchange(world, placement)
        x, ids, weights = inputs(reference, world.rank, "float32", framework)
        one = exchange.start_dispatch(x, ids, weights, layout="expert_major")
        two = exchange.start_dispatch(x * 2, ids, layout="expert_major")  # x * 2 is alive in `two` alone
        second, first = two.finish(), one.finish()
        np.testing.assert_array_equal(numbers(second.rows), numbers(first.rows) * 2)
        pending = exchange.start_combine(first.rows, first.handle)
        np.testing.assert_array_equal(numbers(pending.finish()), expected[world.rank])
        with pytest.raises(ty.UsageError, match="finished already"):
            pending.finish()

    on_ranks(rank_main)


def test_abandoned_calls_keep_their_inputs_and_ranks_in_step():
    reference, placement = scenario(44)

    def rank_main(world):
        exchange = make_exchange(world, placement, depth=2)
        given = inputs(reference, world.rank, "float32", "numpy")
        for _ in range(5):
            exchange.start_dispatch(given[0].copy(), *given[1:])
            gc.collect()
            world.barrier()
            exchange.dispatch(*given).release()
        assert len(exchange._in_flight) <= 2
        exchange.start_dispatch(*given)
        del exchange  # while a call is under way

    on_ranks(rank_main)


def test_ready_says_whether_finish_would_wait():
    placement = ty.Placement.uniform(2, 2)

    def rank_main(world):
        exchange = make_exchange(world, placement, max_tokens_per_rank=4, top_k=1)
        if world.rank == 0:
            pending = exchange.start_dispatch(np.ones((4, HIDDEN), np.float32), np.ones((4, 1), np.int64))
            assert not pending.ready()  # rank 1 has not started
            world.barrier()
            out = pending.finish()
        else:
            world.barrier()
            out = exchange.dispatch(np.ones((4, HIDDEN), np.float32), np.ones((4, 1), np.int64))
        assert out.num_rows == 8 * world.rank

    on_ranks(rank_main, 2)


def test_spans_link_bytes_and_options():
    reference, placement = scenario(45)

    def rank_main(world):
        exchange = make_exchange(world, placement, trace=True)
        out = exchange.dispatch(*inputs(reference, world.rank, "float32", "numpy"))
        sent = [int(count) * HIDDEN * 4 for count in out.sent_counts]
        assert exchange.link_bytes() == sent
        spans = exchange.take_spans()
        assert spans and all(span.end_ns >= span.begin_ns and span.call == 1 for span in spans)
        assert exchange.take_spans() == []
        assert exchange.options.receive_rows == 27 and exchange.options.depth == 2
        assert exchange.transport == "inproc"

    on_ranks(rank_main)


@pytest.mark.parametrize("mode", ["throughput", "latency"])
def test_peer_waits_name_who_was_late(mode):
    """Rank 2 is late for the dispatch, rank 0 for the combine."""
    late_s = 0.5

    def rank_main(world):
        exchange = make_exchange(world, ty.Placement.uniform(3, 3), mode=mode)
        assert exchange.peer_waits() == ([0, 0, 0], [0, 0, 0])
        world.barrier()
        time.sleep(late_s if world.rank == 2 else 0)
        out = exchange.dispatch(np.ones((4, HIDDEN), np.float32), np.array([[0], [1], [2], [0]]))
        world.barrier()
        time.sleep(late_s if world.rank == 0 else 0)
        exchange.combine(out.rows, out.handle)
        return exchange.peer_waits()

    waits = on_ranks(rank_main)
    for rank in range(3):
        for waited, late in zip(waits[rank], (2, 0)):
            for peer in range(3):
                least = 0.8e9 * late_s
                assert (waited[peer] > least) == (peer == late != rank) and waited[peer] < 5 * least, (rank, waits)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("started", [False, True])
def test_waits_are_added_to_what_is_given(started, framework):
    """Rank 2 is late for the dispatches, rank 0 for the combines, each of which is made twice."""
    late_s = 0.2

    def late(world, who, call, *args, **options):
        world.barrier()
        time.sleep(late_s if world.rank == who else 0)
        return call(*args, **options)

    def rank_main(world):
        exchange = make_exchange(world, ty.Placement.uniform(3, 3))
        x, ids = make(np.ones((4, HIDDEN)), "float32", framework), make([[0], [1], [2], [0]], "int64", framework)
        in_dispatch, in_combine = (make([5, 5, 5], "int64", framework) for _ in range(2))
        for _ in range(2):
            if started:
                out = late(world, 2, exchange.start_dispatch, x, ids, waits=in_dispatch).finish()
                late(world, 0, exchange.start_combine, out.rows, out.handle, waits=in_combine).finish()
            else:
                out = late(world, 2, exchange.dispatch, x, ids, waits=in_dispatch)
                late(world, 0, exchange.combine, out.rows, out.handle, waits=in_combine)
        exchange.combine(exchange.dispatch(x, ids).rows, out.handle)  # does not ask, and options are kept from call to call
        return in_dispatch.tolist(), in_combine.tolist(), exchange.peer_waits()

    for rank, (in_dispatch, in_combine, all_waits) in enumerate(on_ranks(rank_main)):
        for waits, who, most in zip((in_dispatch, in_combine), (2, 0), all_waits):
            assert waits[rank] == 5 and all(0 <= one - 5 <= there for one, there in zip(waits, most))
            if rank != who:
                assert waits[who] >= 2 * 0.5e9 * late_s and waits[who] == max(waits), (rank, waits)


def test_waits_of_the_wrong_kind():
    def rank_main(world):
        exchange = make_exchange(world, ty.Placement.uniform(3, 3))
        x, ids = np.ones((4, HIDDEN), np.float32), np.array([[0], [1], [2], [0]])
        read_only = np.zeros(3, np.int64)
        read_only.flags.writeable = False
        for waits, text in [([0, 0, 0], "waits is a list that cannot be written"), (read_only, "waits is a ndarray that cannot be written"),
                            (np.zeros(3), r"waits is \[3\] float64; expected \[3\] int64, a number for each rank"),
                            (np.zeros(2, np.int64), r"waits is \[2\] int64; expected \[3\] int64"),
                            (np.zeros(6, np.int64)[::2], r"waits is \[3\] int64 with strides \[2\]; expected a dense tensor")]:
            with pytest.raises(ty.UsageError, match=text):
                exchange.dispatch(x, ids, waits=waits)
            out = exchange.dispatch(x, ids)
            with pytest.raises(ty.UsageError, match=text):
                exchange.combine(out.rows, out.handle, waits=waits)
            exchange.combine(out.rows, out.handle)

    on_ranks(rank_main)


def test_finish_twice_on_the_main_thread():
    exchange = make_exchange(ty.World.in_process(1)[0], ty.Placement.uniform(3, 1))
    pending = exchange.start_dispatch(np.ones((2, HIDDEN), np.float32), np.zeros((2, 1), np.int64))
    assert pending.finish().num_rows == 2
    with pytest.raises(ty.UsageError, match="finished already"):
        pending.finish()
