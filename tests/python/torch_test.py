"""Gradients of dispatch and combine, and the dispatcher's kinds against each other and a dense MoE."""
import time

import pytest

torch = pytest.importorskip("torch")

import tokenyard as ty  # noqa: E402
import tokenyard.torch as tyt  # noqa: E402
from tokenyard.torch import work  # noqa: E402
from torch_reference import Ranks, compute, dense, experts_of  # noqa: E402

HIDDEN, EXPERTS, TOP_K = 4, 5, 2
TOKENS = [3, 0, 4]
KINDS = ["all_gather", "all_to_all", "direct"]


def given(tokens=TOKENS, experts=EXPERTS, seed=3, dtype=torch.float64, grad_weights=True):
    """Inputs of all ranks: ids, and (x, weights) rank by rank; weights of few bits, so that float32 holds them."""
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(-1, experts, (t, TOP_K), generator=rng) for t in tokens]
    inputs = []
    for t in tokens:
        inputs.append(torch.randn(t, HIDDEN, generator=rng, dtype=torch.float64).to(dtype).requires_grad_())
        inputs.append((torch.randint(1, 9, (t, TOP_K), generator=rng) / 8).to(dtype).requires_grad_(grad_weights))
    return ids, inputs


def local_matrices(matrices, placement, rank):
    """Of the local experts; a tensor-parallel shard holds its part of the sum over the inner dimension."""
    return [matrices[e] for e in placement.local_experts(rank)]


def grouped(rows, counts, matrices):
    """Every expert on its rows; connected to the graph also without rows."""
    parts = [compute(part, matrix) for part, matrix in zip(rows.split(counts), matrices)] if counts else []
    return torch.cat([*parts, rows[rows.shape[0]:]])


def exchange_for(world, placement, **options):
    return ty.Exchange(world, placement, hidden_size=HIDDEN, top_k=TOP_K, max_tokens_per_rank=4, dtype="float64", **options)


def check_against_dense(ranks, ids, inputs, matrices, tolerance=1e-12, scale=1.0):
    """The outputs, and all gradients of a random projection of them."""
    outputs = ranks(*inputs)
    expected = [scale * dense(inputs[2 * r], ids[r], inputs[2 * r + 1], matrices) for r in range(len(ids))]
    rng = torch.Generator().manual_seed(0)
    upstream = [torch.randn(out.shape, generator=rng, dtype=out.dtype) for out in expected]
    for out, want in zip(outputs, expected):
        torch.testing.assert_close(out, want.to(out.dtype), rtol=tolerance, atol=tolerance)
    wanted = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(outputs, wanted, [u.to(o.dtype) for u, o in zip(upstream, outputs)])
    want = torch.autograd.grad(expected, wanted, upstream, allow_unused=True)
    for a, b in zip(found, want):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=max(tolerance, 1e-6), atol=max(tolerance, 1e-6))
    return outputs, found


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("weighting", ["none", "at_expert", "at_source"])
def test_functions_expert_major(weighting, alignment):
    placement, matrices = ty.Placement.uniform(EXPERTS, 3), experts_of(EXPERTS, HIDDEN)
    ids, inputs = given()

    def rank_main(exchange, rank, x, weights):
        out = tyt.dispatch(exchange, x, ids[rank], weights, alignment=alignment)
        counts = (out.received.expert_offsets[1:] - out.received.expert_offsets[:-1]).tolist()
        y = grouped(out.rows, counts, local_matrices(matrices, placement, rank))
        if weighting == "none":
            y = y * out.row_weights[:, None]
        return tyt.combine(exchange, y, out, weighting=weighting, topk_weights=None if weighting == "none" else weights)

    check_against_dense(Ranks(3, rank_main, lambda world: exchange_for(world, placement)), ids, inputs, matrices)


def test_functions_token_major():
    """The caller folds: row_weights [N,K] carry the gradient."""
    placement, matrices = ty.Placement.uniform(EXPERTS, 3), experts_of(EXPERTS, HIDDEN)
    ids, inputs = given(seed=4)

    def rank_main(exchange, rank, x, weights):
        out = tyt.dispatch(exchange, x, ids[rank], weights, layout="token_major")
        y = out.rows * 0
        for local, matrix in enumerate(local_matrices(matrices, placement, rank)):
            factor = (out.row_weights * (out.received.local_ids == local)).sum(1, keepdim=True)
            y = y + factor * compute(out.rows, matrix)
        return tyt.combine(exchange, y, out)

    check_against_dense(Ranks(3, rank_main, lambda world: exchange_for(world, placement)), ids, inputs, matrices)


@pytest.mark.parametrize("weighting", ["none", "at_expert", "at_source"])
def test_gradcheck_in_float64(weighting):
    """Rows by the usual small steps. Weights travel as float32, and the sums are linear in them: a large step is exact."""
    placement, matrices = ty.Placement.uniform(EXPERTS, 3), experts_of(EXPERTS, HIDDEN)
    ids, inputs = given(tokens=[2, 0, 1])

    def rank_main(exchange, rank, x, weights):
        out = tyt.dispatch(exchange, x, ids[rank], weights)
        y = grouped(out.rows, out.received.expert_counts.tolist(), local_matrices(matrices, placement, rank))
        if weighting == "none":
            return tyt.combine(exchange, y * out.row_weights[:, None], out)
        return tyt.combine(exchange, y, out, weighting=weighting, topk_weights=weights)

    ranks = Ranks(3, rank_main, lambda world: exchange_for(world, placement))
    rows = inputs[0::2]
    weights = [t.detach().requires_grad_() for t in inputs[1::2]]

    def of_rows(*rows):
        return ranks(*(t for pair in zip(rows, (w.detach() for w in weights)) for t in pair))

    def of_weights(*weights):
        return ranks(*(t for pair in zip((x.detach() for x in rows), weights) for t in pair))

    assert torch.autograd.gradcheck(of_rows, rows, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(of_weights, weights, eps=1 / 16, atol=1e-5)


PLACEMENTS = {  # made by the tests: what pytest holds may live beyond the end of the C++ module where torch is imported, and is reported as leaked
    "uniform": (lambda: ty.Placement.uniform(EXPERTS, 3), TOKENS, 1),
    "expert_tp": (lambda: ty.Placement.tensor_parallel(EXPERTS, ep=2, tp=2), [3, 0, 4, 1], 2),
    "replicated": (lambda: ty.Placement.replicated(EXPERTS, 3, load=[9, 1, 1, 1, 1], redundant=2), TOKENS, 1),
    "few_experts": (lambda: ty.Placement.uniform(2, 3), TOKENS, 1),
}


@pytest.mark.parametrize("async_op", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("grad_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("make, tokens, shards", PLACEMENTS.values(), ids=PLACEMENTS)
def test_every_kind_gives_the_dense_answer(make, tokens, shards, grad_weights, async_op):
    placement, matrices = make(), experts_of(EXPERTS, HIDDEN)
    ids, inputs = given(tokens, placement.num_experts, seed=5, grad_weights=grad_weights)
    found = {}
    for kind in KINDS:
        def setup(world):
            return tyt.MoEDispatcher(world, placement, hidden_size=HIDDEN, top_k=TOP_K, max_tokens_per_rank=4, dtype="float64", kind=kind)

        def rank_main(dispatcher, rank, x, weights):
            local = local_matrices(matrices, placement, rank)
            return dispatcher(x, ids[rank], weights, lambda rows, counts: grouped(rows, counts, local), async_op=async_op)

        found[kind] = check_against_dense(Ranks(len(tokens), rank_main, setup), ids, inputs, matrices, 1e-7 if shards > 1 else 1e-9, shards)
    for kind in KINDS:
        torch.testing.assert_close(found[kind], found["direct"], rtol=1e-7, atol=1e-7)


def test_single_is_auto_in_a_world_of_one():
    placement, matrices = ty.Placement.uniform(EXPERTS, 1), experts_of(EXPERTS, HIDDEN)
    ids, inputs = given([6], seed=6)
    for kind in ("auto", "single", "direct", "all_gather", "all_to_all"):
        def setup(world):
            made = tyt.MoEDispatcher(world, placement, hidden_size=HIDDEN, top_k=TOP_K, max_tokens_per_rank=6, dtype="float64", kind=kind)
            assert made.kind == ("single" if kind == "auto" else kind)
            return made

        ranks = Ranks(1, lambda d, rank, x, w: d(x, ids[0], w, lambda rows, counts: grouped(rows, counts, matrices)), setup)
        check_against_dense(ranks, ids, inputs, matrices, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinds_agree_bit_for_bit_where_sums_are_exact(dtype):
    placement = ty.Placement.uniform(EXPERTS, 3)
    rng = torch.Generator().manual_seed(7)
    ids = [torch.randint(-1, EXPERTS, (t, TOP_K), generator=rng) for t in TOKENS]
    inputs = [t for n in TOKENS for t in (torch.randint(-2, 3, (n, 8), generator=rng).to(dtype).requires_grad_(),
                                          (torch.randint(1, 5, (n, TOP_K), generator=rng) / 4).requires_grad_())]
    upstream = [torch.randint(-2, 3, (n, 8), generator=rng).to(dtype) for n in TOKENS]
    found = []
    for kind in KINDS:
        ranks = Ranks(3, lambda d, rank, x, w: d(x, ids[rank], w, lambda rows, counts: rows * 2), lambda world: tyt.MoEDispatcher(
            world, placement, hidden_size=8, top_k=TOP_K, max_tokens_per_rank=4, dtype="float32", kind=kind))
        outputs = ranks(*inputs)
        found.append([*outputs, *torch.autograd.grad(outputs, inputs, upstream)])
    for other in found[1:]:
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found[0], other))


def delayed(dispatcher, monkeypatch, seconds=0.05):
    """Every communication of the dispatcher takes long, and its results are written at the very end."""
    for name in ("dispatch", "dispatch_backward", "combine", "combine_backward"):
        call = getattr(dispatcher._kind, name)

        def slow(*args, call=call):
            time.sleep(seconds)
            return call(*args)

        setattr(dispatcher._kind, name, slow)
    return dispatcher


@pytest.mark.parametrize("kind", ["all_to_all", "direct"])
@pytest.mark.parametrize("waits", [True, False], ids=["waits", "without_waits"])
def test_inputs_wait_for_the_backward_of_their_stage(kind, waits, monkeypatch):
    """With slow communication gradients are right because inputs wait for them, and wrong without: the test can fail."""
    placement, matrices = ty.Placement.uniform(EXPERTS, 2), experts_of(EXPERTS, HIDDEN)
    ids, inputs = given([3, 4], seed=8)
    if not waits:
        monkeypatch.setattr(work.Gradients, "wait", lambda self: None)
        real = torch.empty  # what has not been written is known
        monkeypatch.setattr(work.torch, "empty", lambda *a, **k: real(*a, **k).fill_(1234.5))

    def setup(world):
        return delayed(tyt.MoEDispatcher(world, placement, hidden_size=HIDDEN, top_k=TOP_K, max_tokens_per_rank=4, dtype="float64", kind=kind), monkeypatch)

    def rank_main(dispatcher, rank, x, weights):
        local = local_matrices(matrices, placement, rank)
        return dispatcher(x, ids[rank], weights, lambda rows, counts: grouped(rows, counts, local), async_op=True)

    ranks = Ranks(2, rank_main, setup)
    if waits:
        check_against_dense(ranks, ids, inputs, matrices, 1e-9)
    else:
        found = torch.autograd.grad(ranks(*inputs), inputs, [torch.ones(3, HIDDEN).double(), torch.ones(4, HIDDEN).double()])
        assert any((grad == 1234.5).any() for grad in found)
        time.sleep(0.3)


def test_stages_run_beside_other_work(monkeypatch):
    placement, matrices = ty.Placement.uniform(EXPERTS, 2), experts_of(EXPERTS, HIDDEN)
    ids, inputs = given([3, 4], seed=9)

    def setup(world):
        return delayed(tyt.MoEDispatcher(world, placement, hidden_size=HIDDEN, top_k=TOP_K, max_tokens_per_rank=4, dtype="float64", kind="direct"), monkeypatch, 0.2)

    def rank_main(d, rank, x, weights):
        started = d.dispatch(d.dispatch_preprocess(x, ids[rank], weights, async_op=True), async_op=True)
        assert not started.work.ready()  # and this line is reached before it is
        experts = d.dispatch_postprocess(started)
        assert started.work.ready() and sum(experts.tokens_per_expert) == experts.rows.shape[0] == experts.row_weights.shape[0]
        y = grouped(experts.rows, experts.tokens_per_expert, local_matrices(matrices, placement, rank))
        started = d.combine(d.combine_preprocess(experts, y, async_op=True), async_op=True)
        assert not started.work.ready()
        return d.combine_postprocess(started)

    check_against_dense(Ranks(2, rank_main, setup), ids, inputs, matrices, 1e-9)


def test_without_grad_nothing_is_kept():
    dispatcher = tyt.MoEDispatcher(ty.World.in_process(1)[0], ty.Placement.uniform(2, 1), hidden_size=4, top_k=1, max_tokens_per_rank=3, dtype="float32", kind="direct")
    with torch.no_grad():
        y = dispatcher(torch.ones(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), lambda rows, counts: rows, async_op=True)
    assert y.grad_fn is None and torch.equal(y, torch.ones(3, 4))


@pytest.mark.parametrize("arguments, text", [
    (dict(kind="fastest"), "kind = 'fastest'; expected one of auto, single"),
    (dict(kind="single"), "kind = 'single' in a world of 2 ranks; use 'direct'"),
    (dict(kind="all_gather", device="cuda"), "GPU"),
])
def test_dispatcher_rejects(arguments, text):
    with pytest.raises(ty.UsageError, match=text):
        tyt.MoEDispatcher(ty.World.in_process(2)[0], ty.Placement.uniform(2, 2), hidden_size=4, top_k=1, max_tokens_per_rank=3, **arguments)


def test_stage_arguments_are_checked():
    dispatcher = tyt.MoEDispatcher(ty.World.in_process(1)[0], ty.Placement.uniform(2, 1), hidden_size=4, top_k=1, max_tokens_per_rank=3, dtype="float32")
    with pytest.raises(ty.UsageError, match=r"x is \[3, 4\], topk_ids \[2, 1\], topk_weights \[3, 1\]; expected"):
        dispatcher.dispatch_preprocess(torch.ones(3, 4), torch.zeros(2, 1), torch.ones(3, 1))
    with pytest.raises(ty.UsageError, match=r"rows is \[1, 4\]; expected one row for each of the 3 rows"):
        dispatcher(torch.ones(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), lambda rows, counts: rows[:1])
    with pytest.raises(ty.UsageError, match="layout = 'rank_slots'; the differentiable dispatch has token_major and expert_major"):
        tyt.dispatch(None, torch.ones(3, 4), torch.zeros(3, 1), layout="rank_slots")
    with pytest.raises(ty.UsageError, match="at_source' without topk_weights"):
        tyt.combine(None, torch.ones(3, 4), None, weighting="at_source")


def test_worlds_from_process_groups(tmp_path):
    def rank_main(world):
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=world.rank, world_size=world.size)
        whole = tyt.world_from_group()
        assert (whole.rank, whole.size, whole.local_rank) == (world.rank, 3, world.rank)
        groups = [dist.new_group([0, 2]), dist.new_group([1])]
        part = ty.World.from_group(groups[world.rank % 2])
        exchange = ty.Exchange(part, ty.Placement.uniform(4, part.size), hidden_size=4, top_k=1, max_tokens_per_rank=2, dtype="float32")
        out = exchange.dispatch(torch.ones(2, 4), torch.tensor([[0], [3]]))
        assert torch.equal(exchange.combine(out.rows, out.handle), torch.ones(2, 4))
        dist.destroy_process_group()
        return part.rank, part.size, out.num_rows

    assert ty.run_ranks(rank_main, 3, timeout_ms=30_000) == [(0, 2, 2), (0, 1, 2), (1, 2, 2)]


def test_a_world_may_go_before_the_ranks_meet_again(tmp_path):
    """The first rank holds the store; letting go of its world does not make it wait for ranks that wait for it."""
    def rank_main(world):
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=world.rank, world_size=world.size)
        met = tyt.world_from_group()
        begin = time.monotonic()
        if world.rank == 0:
            del met
            dist.barrier()
        else:
            dist.barrier()
            assert met.size == 2
        dist.destroy_process_group()
        return time.monotonic() - begin

    assert max(ty.run_ranks(rank_main, 2, timeout_ms=30_000)) < 5
