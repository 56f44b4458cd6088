"""Every wrong argument is a UsageError with value, expectation and remedy; operating failures carry rank, peer and phase."""
import pickle

import numpy as np
import pytest

import tokenyard as ty
from support import HIDDEN, TOP_K, make_exchange, on_ranks, torch

X = np.ones((4, HIDDEN), np.float32)
IDS = np.zeros((4, TOP_K), np.int64)
WEIGHTS = np.ones((4, TOP_K), np.float32)


@pytest.fixture(scope="module")
def exchange():
    return make_exchange(ty.World.in_process(1)[0], ty.Placement.uniform(6, 1))


@pytest.mark.parametrize("arguments, text", [
    (dict(topk_ids=None), r"dispatch without topk_ids; give them, or the handle"),
    (dict(topk_ids=IDS + 6), r"topk_ids\[0, 0\] = 6 but the placement has 6 experts; use ids 0 to 5"),
    (dict(topk_ids=IDS.astype(np.float32)), r"topk_ids is \[4, 3\] float32; expected int64 or int32"),
    (dict(topk_ids=np.zeros((4, 4), np.int64)), r"so top_k = 4; the exchange was made for top_k 1 to 3"),
    (dict(x=np.ones((10, HIDDEN), np.float32), topk_ids=np.zeros((10, 3), np.int64)), r"10 tokens; the exchange was made for max_tokens_per_rank = 9"),
    (dict(x=X[:3]), r"rows is \[3, 16\] float32; expected \[4, H\], one row per token"),
    (dict(x=X[:, :7].copy()), r"rows of 7 float32 are 28 bytes; expected a positive multiple of 16: pad the hidden size"),
    (dict(x=np.ones((4, 32), np.float32)), r"rows are 128 bytes each; the exchange was made for max_row_bytes = 64"),
    (dict(x=np.asfortranarray(X)), r"elements of a row must be contiguous"),
    (dict(x=np.ones((1, 1, 1, 4, HIDDEN), np.float32)), r"x: an array \[1, 1, 1, 4, 16\] of 5 dimensions; expected 1 to 4"),
    (dict(x=object()), r"x is a object; expected a NumPy array, a torch tensor"),
    (dict(topk_weights=WEIGHTS[:2]), r"topk_weights is \[2, 3\] float32; expected \[4, 3\] float32 like topk_ids"),
    (dict(topk_weights=WEIGHTS * np.nan), r"topk_weights\[0, 0\] = nan; expected a finite weight"),
    (dict(scales=np.ones((4, 1), np.float32)), r"scales are 4 bytes per row; the exchange was made for max_scale_bytes = 0"),
    (dict(layout="sideways"), r"sideways"),
    (dict(layout="rank_slots"), r"layout = rank_slots needs mode = latency; it is throughput"),
    (dict(mode="latency", sizing="exact"), r"sizing = exact with mode = latency; .* use sizing = capacity"),
    (dict(sizing="roomy"), r"roomy"),
    (dict(sizing=["exact"]), r"sizing = \['exact'\] is a list; expected something like 'exact'"),
    (dict(alignment="8"), r"alignment = '8' is a str; expected something like 1"),
    (dict(layout="expert_major", alignment=3), r"alignment = 3; expected a power of two, 1 to 256"),
    (dict(alignment=8), r"alignment = 8 with layout = token_major; only expert_major has it"),
    (dict(layout="expert_major", gather_map=True), r"gather_map with layout = expert_major; only token_major has it"),
    (dict(expert_capacity=8), r"expert_capacity = 8 with layout = token_major; only the expert layouts have it"),
    (dict(drop=True), r"drop without expert_capacity on an expert layout drops nothing; set both"),
    (dict(out_rows=X.copy()), r"out_rows is \[4, 16\] float32 but copy_out is false; set copy_out"),
    (dict(copy_out=True, out_rows=X.astype(np.float64)), r"out_rows is \[4, 16\] float64; expected a dense \[rows, 16\] float32"),
    (dict(copy_out=True, out_rows=[[1.0]]), r"out_rows is a list that cannot be written"),
    (dict(quantise="float33"), r"scale format float33; expected float32, float32_pow2 or ue8m0"),
    (dict(dtype="float16"), r"x: an array of 32-bit elements as dtype = float16, which has 16 bits"),
    (dict(placement=5), r"5"),
    (dict(placement="half"), r"placement = 'half'; expected a Placement, or the number that add\(\) gave it"),
    (dict(topk_ids=None, handle=X), r"handle is a ndarray; expected the .handle of what a dispatch returned"),
    (dict(x="rows"), r"x is a str; expected a NumPy array"),
    (dict(dtype=np.float32), r"dtype = <class 'numpy.float32'> is a type; expected a name, 'bfloat16' say"),
])
def test_dispatch_rejects(exchange, arguments, text):
    with pytest.raises(ty.UsageError, match=text):
        exchange.dispatch(**{"x": X, "topk_ids": IDS, "topk_weights": WEIGHTS, **arguments})
    assert exchange.dispatch(X, IDS, WEIGHTS).num_rows == 4  # the next call is fine


@pytest.mark.parametrize("arguments, text", [
    (dict(rows=X[:3]), r"y is \[3, 16\] float32; expected the rows of the dispatch: \[4, H\] in layout token_major"),
    (dict(rows=X.astype(np.int64)), r"y is \[4, 16\] int64; combine adds float64, float32, bfloat16 and float16"),
    (dict(weighting="at_expert"), r"weighting = at_expert with layout = token_major; its rows are already folded"),
    (dict(weighting="heavy"), r"heavy"),
    (dict(source_weights=WEIGHTS), r"source_weights with weighting = none; use at_source"),
    (dict(row_weights=WEIGHTS[:1]), r"row_weights is \[1, 3\] float32; expected 12 float32 values"),
    (dict(bias=X[:2]), r"bias0 is \[2, 16\] float32; expected \[4, 16\] with contiguous rows"),
    (dict(bias=[X, X, X]), r"3 biases; combine adds at most two"),
    (dict(bias=X.astype(np.float64)), r"a bias is \[4, 16\] float64; expected y's dtype float32"),
    (dict(out=X.astype(np.int64)), r"out is \[4, 16\] int64; expected float64, float32, bfloat16 or float16"),
    (dict(order="backwards"), r"backwards"),
    (dict(fold="yes"), r"fold = 'yes' is a str; expected something like True"),
    (dict(weighting=["none"]), r"weighting = \['none'\] is a list; expected something like 'none'"),
    (dict(handle=None), r"handle is a NoneType; expected the .handle of what a dispatch returned"),
])
def test_combine_rejects(exchange, arguments, text):
    handle = exchange.dispatch(X, IDS, WEIGHTS).handle
    with pytest.raises(ty.UsageError, match=text):
        exchange.combine(**{"rows": X, "handle": handle, **arguments})
    assert exchange.combine(X, handle).shape == X.shape


def test_read_only_memory_is_no_out(exchange):
    out = X.copy()
    out.flags.writeable = False
    with pytest.raises(ty.UsageError, match="out is a ndarray that cannot be written; expected a writable NumPy array"):
        exchange.combine(X, exchange.dispatch(X, IDS).handle, out=out)
    assert exchange.dispatch(out, IDS).num_rows == 4  # but a fine input


@pytest.mark.parametrize("options, text", [
    (dict(hidden_size=3), r"max_row_bytes = 12"),
    (dict(top_k=65), r"65"),
    (dict(dtype="float7"), r"float7"),
    (dict(device="abacus"), r"abacus"),
    (dict(mode="lazy"), r"lazy"),
    (dict(receive_row=3), r"an exchange has no option 'receive_row'; expected one of .*receive_rows"),
    (dict(depth=0), r"depth = 0"),
    (dict(depth="two"), r"depth = 'two' is a str; expected something like 2"),
    (dict(transport="nccl_window"), r"transport nccl_window is memory of GPUs; use it with device = cuda"),
    (dict(nccl_communicator=4096), r"nccl_communicator is given, and transport automatic uses none; use transport nccl_window"),
    (dict(dtype=np.float32), r"dtype = <class 'numpy.float32'> is a type; expected a name"),
    (dict(combine_dtype=4), r"combine_dtype = 4 is a int; expected a name"),
    (dict(hidden_size=None), r"hidden_size = None is a NoneType; expected an integer"),
])
def test_exchange_rejects(options, text):
    with pytest.raises(ty.UsageError, match=text):
        make_exchange(ty.World.in_process(1)[0], ty.Placement.uniform(6, 1), **options)


@pytest.mark.parametrize("world, placement, text", [
    (None, lambda *sizes: ty.Placement.uniform(*sizes), r"world is a NoneType; expected a World: World.from_group\(group\)"),
    (0, lambda *_: "all", r"placement = 'all' is a str; expected a Placement, or a list of them"),
    (0, lambda *_: [7], r"placement = 7 is a int; expected a Placement, or a list of them"),
])
def test_what_an_exchange_is_made_of(world, placement, text):
    with pytest.raises(ty.UsageError, match=text):
        make_exchange(world if world is None else ty.World.in_process(1)[world], placement(6, 1))


def test_a_handle_of_another_exchange(exchange):
    other = make_exchange(ty.World.in_process(1)[0], ty.Placement.uniform(6, 1))
    with pytest.raises(ty.UsageError, match="belongs to another exchange; a handle works on the exchange that made it"):
        exchange.combine(X, other.dispatch(X, IDS).handle)


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_cuda_exchange_takes_tensors_on_its_gpu(exchange):
    with pytest.raises(ty.UsageError, match="expert_rows.. needs memory for them: make the exchange with expert_rows = true"):
        exchange.expert_rows(exchange.dispatch(X, IDS).handle, like=X)
    meta = torch.ones((4, HIDDEN), device="meta")
    with pytest.raises(ty.UsageError, match="on meta"):
        exchange.dispatch(meta, IDS)


def test_peers_of_a_rejected_call_learn_the_reason():
    def rank_main(world):
        exchange = make_exchange(world, ty.Placement.uniform(6, 3))
        if world.rank == 1:
            with pytest.raises(ty.UsageError, match=r"topk_ids\[0, 0\] = 6"):
                exchange.dispatch(X, IDS + 6)
        else:
            with pytest.raises(ty.TransportError, match=r"topk_ids\[0, 0\] = 6 but the placement has 6 experts") as caught:
                exchange.dispatch(X, IDS)
            error = caught.value
            assert (error.kind, error.rank, error.peer, error.phase, error.epoch) == ("aborted", world.rank, 1, "dispatch_counts", 1)
        assert exchange.dispatch(X, IDS).num_rows == (12 if world.rank == 0 else 0)

    on_ranks(rank_main)


def test_peers_learn_what_python_refuses_and_what_a_rank_abandons():
    def rank_main(world):
        exchange = make_exchange(world, ty.Placement.uniform(6, 3))
        out = exchange.dispatch(X, IDS)
        rows, handle = out.rows, out.handle
        calls = [(lambda: exchange.dispatch(object(), IDS), lambda: exchange.dispatch(X, IDS), "x is a object"),
                 (lambda: exchange.dispatch(X, IDS, placement=7.5), lambda: exchange.start_dispatch(X, IDS).finish(), "placement = 7.5"),
                 (lambda: exchange.combine(rows, handle, bias=(X, X, X)), lambda: exchange.combine(rows, handle), "3 biases"),
                 (lambda: exchange.start_combine(object(), handle), lambda: exchange.combine(rows, handle), "rows is a object")]
        for wrong, right, text in calls:
            with pytest.raises(ty.UsageError if world.rank == 1 else ty.TransportError, match=text):
                wrong() if world.rank == 1 else right()
        if world.rank == 1:
            exchange.abandon("no data today")
        else:
            with pytest.raises(ty.TransportError, match="no data today"):
                exchange.dispatch(X, IDS)
        assert exchange.dispatch(X, IDS).num_rows == (12 if world.rank == 0 else 0)

    on_ranks(rank_main)


def test_different_calls_name_both():
    def rank_main(world):
        exchange = make_exchange(world, ty.Placement.uniform(6, 2))
        with pytest.raises(ty.TransportError, match="token_major.*expert_major|expert_major.*token_major") as caught:
            exchange.dispatch(X, IDS, layout=["token_major", "expert_major"][world.rank])
        assert caught.value.kind == "mismatch"
        assert "mismatch" in exchange.status().failure
        with pytest.raises(ty.TransportError, match="mismatch"):
            exchange.check()
        exchange.clear()
        assert exchange.status().failure is None
        assert exchange.dispatch(X, IDS).num_rows == (8 if world.rank == 0 else 0)

    on_ranks(rank_main, 2)


def test_overflow_is_the_same_on_all_ranks_and_can_be_cleared():
    def rank_main(world):
        exchange = make_exchange(world, ty.Placement.uniform(6, 2), receive_rows=6)
        with pytest.raises(ty.TransportError, match="rank 0 would receive 8 rows, receive_rows is 6; raise it") as caught:
            exchange.dispatch(X, IDS)
        assert (caught.value.kind, caught.value.expected, caught.value.seen) == ("overflow", 6, 8)
        exchange.clear()
        assert exchange.dispatch(X[:2], IDS[:2]).num_rows == (4 if world.rank == 0 else 0)

    on_ranks(rank_main, 2)


def test_timeout_names_the_rank_that_did_not_come():
    def rank_main(world):
        exchange = make_exchange(world, ty.Placement.uniform(6, 2), timeout_ms=300)
        if world.rank == 0:
            with pytest.raises(ty.TransportError, match="timeout after waiting in dispatch_counts of call 1 for rank 1") as caught:
                exchange.dispatch(X, IDS)
            assert (caught.value.kind, caught.value.peer, caught.value.phase) == ("timeout", 1, "dispatch_counts")
        world.barrier()

    on_ranks(rank_main, 2)


def test_errors_travel_between_processes():
    error = ty.TransportError("text", dict(kind="timeout", phase="gather", rank=1, peer=2, epoch=3, expected=4, seen=5, detail="why"))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.kind, again.peer, again.detail) == ("text", "timeout", 2, "why")
    assert issubclass(ty.UsageError, ValueError) and issubclass(ty.TransportError, ty.Error)


@pytest.mark.parametrize("build, text", [
    (lambda: ty.Placement.uniform(5, 2, require_equal_windows=True), "5"),
    (lambda: ty.Placement.uniform(0, 2), "0"),
    (lambda: ty.Placement.custom(2, [[ty.Replica([0, 0])]]), "rank 0"),
    (lambda: ty.Placement.custom(2, [[ty.Replica([2])]]), "2"),
    (lambda: ty.Placement.replicated(4, 2, [1.0] * 3, 1), "3"),
    (lambda: ty.Placement.from_json("{"), "JSON|json|parse"),
    (lambda: ty.moves(ty.Placement.uniform(4, 2), ty.Placement.uniform(5, 2)), "4.*5|5.*4"),
    (lambda: ty.model_preset("none-such"), "none-such.*deepseek-v3"),
    (lambda: ty.Gate.bias_corrected(2, score="tanh"), "score = tanh; expected softmax or sigmoid"),
    (lambda: ty.route(np.zeros((2, 3), np.int64), ty.Gate.softmax(2)), "logits"),
    (lambda: ty.route(np.zeros((2, 3), np.float32), ty.Gate.softmax(4)), "4.*3|3.*4"),
    (lambda: ty.quantise(np.zeros(3, np.float32)), r"x has the shape \[3\]; expected \[T,H\]"),
    (lambda: ty.World.in_process(0), "a world of 0 ranks: expected 1 to"),
    (lambda: ty.World.connect(2, 2, port=1), "rank 2 of a world of 2 ranks: expected 0 to 1"),
    (lambda: ty.run_ranks(print, 0), "ranks = 0: expected 1 or more"),
    (lambda: ty.plan_memory(2, hidden_size=8, top_k=1, max_tokens_per_rank=-1, dtype="float32"), "-1"),
])
def test_everything_else_rejects_with_the_value(build, text):
    with pytest.raises(ty.UsageError, match=text):
        build()
