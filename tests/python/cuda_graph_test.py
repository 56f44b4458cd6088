"""Calls in CUDA graphs: every replay is what the same call outside a graph makes of the tensors as they are now. Nothing waits for the GPU."""
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import deep_ep  # noqa: E402
import tokenyard as ty  # noqa: E402
from cuda_test import EXPERTS, HIDDEN, RANKS, TOP_K, gpu_of, make_exchange  # noqa: E402
from support import Comm  # noqa: E402

TOKENS, REPLAYS = 13, 5


class Batch:
    """Inputs on a GPU that change in place."""

    def __init__(self, device, rank):
        self._rng = torch.Generator().manual_seed(rank + 1)
        self.x = torch.empty(TOKENS - rank, HIDDEN, dtype=torch.bfloat16, device=device)
        self.ids = torch.empty(TOKENS - rank, TOP_K, dtype=torch.int64, device=device)
        self.weights = torch.empty(TOKENS - rank, TOP_K, device=device)
        self.draw()

    def draw(self):
        self.x.copy_(torch.randn(self.x.shape, generator=self._rng))
        ids = torch.stack([torch.randperm(EXPERTS, generator=self._rng)[:TOP_K] for _ in range(len(self.ids))])
        self.ids.copy_(torch.where(torch.rand(ids.shape, generator=self._rng) < 0.2, -1, ids))
        self.weights.copy_(torch.rand(self.weights.shape, generator=self._rng))


def captured(world, call):
    """A graph of call() and what call() returned. One rank after the other: a capture and what surrounds it settle the whole GPU."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.current_stream().synchronize()
    for turn in range(world.size):
        world.barrier()
        if turn == world.rank:
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                result = call()
    world.barrier()
    return graph, result


def check_replays(world, batch, call, compared):
    """compared(result): its tensors, as far as they are defined. Eager calls in between use other memory than replays."""
    compared(call())
    graph, result = captured(world, call)
    for _ in range(REPLAYS):
        batch.draw()
        graph.replay()
        found = [one.clone() for one in compared(result)]
        expected = compared(call())
        assert len(found) == len(expected) and all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))
        assert all(torch.equal(ours, one) for ours, one in zip(found, compared(result))), "an eager call has changed what a replay left"


@pytest.mark.parametrize("layout, mode", [("token_major", "throughput"), ("expert_major", "throughput"), ("expert_padded", "latency"),
                                          ("rank_slots", "latency")])
@pytest.mark.parametrize("copy_out", [False, True])
def test_exchange(layout, mode, copy_out):
    def rank_main(world):
        device = gpu_of(world)
        batch, exchange = Batch(device, world.rank), make_exchange(world, "cuda", mode=mode)
        weighting = "at_expert" if layout.startswith("expert") else "none"

        def call():
            out = exchange.dispatch(batch.x, batch.ids, batch.weights, layout=layout, sizing="capacity", copy_out=copy_out)
            pending = exchange.start_combine(out.rows, out.handle, weighting=weighting)
            return pending.finish(), out.expert_counts

        check_replays(world, batch, call, list)
        exchange.check()

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def low_latency(buffer, batch, how, use_fp8):
    """One round of the low-latency calls: (rows as they came, sums, handle, counts)."""
    options = {"hook": {"return_recv_hook": True}, "async": {"async_finish": True}, "plain": {}}[how]

    def end(event, hook):
        hook() if hook else event.current_stream_wait() if event.event else None

    recv, counts, handle, event, hook = buffer.low_latency_dispatch(batch.x, batch.ids, TOKENS, EXPERTS, use_fp8=use_fp8, **options)
    end(event, hook)
    y = recv[0].float() * recv[1].repeat_interleave(128, 2) if use_fp8 else recv
    sums, event, hook = buffer.low_latency_combine(y.bfloat16(), batch.ids, batch.weights, handle, **options)
    end(event, hook)
    return recv[0] if use_fp8 else recv, sums, handle, counts


@pytest.mark.parametrize("how", ["plain", "async", "hook"])
@pytest.mark.parametrize("use_fp8", [False, True])
def test_low_latency_of_deep_ep(how, use_fp8):
    def rank_main(world):
        device = gpu_of(world)
        batch, buffer = Batch(device, world.rank), deep_ep.Buffer(comm=Comm(world), low_latency_mode=True)

        def compared(result):
            rows, sums, (source, ranges, *_), counts = result
            used = torch.arange(rows.shape[1], device=device) < counts[:, None]
            return rows.view(torch.uint8)[used], sums, source[used], ranges, counts

        check_replays(world, batch, lambda: low_latency(buffer, batch, how, use_fp8), compared)

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def test_num_worst_tokens_of_deep_ep():
    worst = RANKS * TOKENS

    def rank_main(world):
        device = gpu_of(world)
        batch, buffer = Batch(device, world.rank), deep_ep.Buffer(comm=Comm(world))

        def call():
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(batch.ids, EXPERTS)
            rows, ids, weights, counts, handle, _ = buffer.dispatch(
                batch.x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=batch.ids,
                topk_weights=batch.weights, num_worst_tokens=worst)
            assert counts == [] and rows.shape == (worst, HIDDEN) and ids.shape == weights.shape == (worst, TOP_K)
            sums, summed, _ = buffer.combine(rows, handle, topk_weights=weights)
            again = buffer.dispatch(batch.x, handle=handle)[0]
            return rows, ids, weights, sums, summed, again, handle[0][:, world.rank], handle[3]

        def compared(result):
            rows, ids, weights, sums, summed, again, prefix, source = result
            used = source >= 0
            assert torch.equal(used.sum(), prefix[-1]) and (ids[~used] == -1).all() and (weights[~used] == 0).all()
            return rows[used], ids, weights, sums, summed, again[used], prefix, source

        check_replays(world, batch, call, compared)

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def elastic(buffer, batch, expand, cpu_sync=0):
    """One round of ElasticBuffer's calls: (rows, ids, weights, handle, rows of the cached dispatch, sums, sums of weights)."""
    rows, ids, weights, handle, _ = buffer.dispatch(batch.x, batch.ids, batch.weights, num_experts=EXPERTS, expert_alignment=4, do_expand=expand,
                                                    do_cpu_sync=cpu_sync, do_zero_padding=True)
    again = buffer.dispatch(batch.x, handle=handle)[0]
    return rows, ids, weights, handle, again, *buffer.combine(rows, handle, topk_weights=weights)[:2]


def used_of_elastic(result):
    """Its tensors, as far as they are defined."""
    rows, ids, weights, handle, again, sums, summed = result
    tokens = handle.recv_src_metadata[:, 0] >= 0
    used = (handle.source_k[:len(rows)] >= 0) if handle.do_expand else tokens
    assert torch.equal(tokens.sum(), handle.psum_num_recv_tokens_per_scaleup_rank[-1])
    return (rows[used], weights[used], again[used], sums, summed, handle.recv_src_metadata[tokens], handle.psum_num_recv_tokens_per_expert,
            handle.num_unaligned_recv_tokens_per_expert, *([] if handle.do_expand else [ids[used]]))


@pytest.mark.parametrize("expand", [False, True])
def test_elastic_of_deep_ep(expand, monkeypatch):
    monkeypatch.setattr(deep_ep.elastic, "world_of", lambda world, *_: world)

    def rank_main(world):
        device = gpu_of(world)
        batch, buffer = Batch(device, world.rank), deep_ep.ElasticBuffer(world, num_bytes=0, num_max_tokens_per_rank=TOKENS)
        rows, exact = elastic(buffer, batch, expand), elastic(buffer, batch, expand, cpu_sync=1)
        assert rows[3].num_recv_tokens == RANKS * TOKENS and rows[3].num_recv_tokens_per_expert_list == [] != exact[3].num_recv_tokens_per_expert_list
        assert len(rows[0]) == (92 if expand else RANKS * TOKENS) > len(exact[0])  # 2 * 13 tokens * 3 + 4 experts * 3, aligned to 4
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(used_of_elastic(rows), used_of_elastic(exact)))
        check_replays(world, batch, lambda: elastic(buffer, batch, expand), used_of_elastic)

        def refused():
            with pytest.raises(ty.UsageError, match="do_cpu_sync while a graph is being captured"):
                elastic(buffer, batch, expand, cpu_sync=1)

        captured(world, refused)
        torch.cuda._sleep(500_000_000)  # some tenths of a second
        before = torch.cuda.current_stream().record_event()
        elastic(buffer, batch, expand)
        assert not before.query(), "the host has waited for the GPU"
        torch.cuda.current_stream().synchronize()

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def test_low_latency_of_deep_ep_waits_for_nothing():
    def rank_main(world):
        device = gpu_of(world)
        batch, buffer = Batch(device, world.rank), deep_ep.Buffer(comm=Comm(world), low_latency_mode=True)
        for how in ("plain", "async", "hook"):
            low_latency(buffer, batch, how, True)
        torch.cuda.current_stream().synchronize()
        world.barrier()
        for how in ("plain", "async", "hook"):
            torch.cuda._sleep(500_000_000)  # some tenths of a second
            before = torch.cuda.current_stream().record_event()
            low_latency(buffer, batch, how, True)
            assert not before.query(), f"{how}: the host has waited for the GPU"
            torch.cuda.current_stream().synchronize()

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def test_what_a_capture_lacks_is_named():
    def rank_main(world):
        device = gpu_of(world)
        batch, buffer = Batch(device, world.rank), deep_ep.Buffer(comm=Comm(world), low_latency_mode=True)

        def call():
            with pytest.raises(ty.UsageError, match="a graph is being captured, and this call needs new buffers for max_tokens_per_rank = 13"):
                low_latency(buffer, batch, "plain", False)

        captured(world, call)
        assert low_latency(buffer, batch, "plain", False)[1].shape == batch.x.shape

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)
