"""CUDA tensors through the package: the same bits as on the CPU, in the order of torch's current stream, and with gradients.

Ranks are threads, each with a stream of its own: on one stream the kernel of one rank would wait for that of the other behind it.
"""
import time

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import tokenyard as ty  # noqa: E402
import tokenyard.torch as tyt  # noqa: E402

RANKS, TOKENS, HIDDEN, EXPERTS, TOP_K = 2, 13, 512, 8, 3
FIELDS = ["local_ids", "row_weights", "source_rank", "source_token", "expert_counts", "expert_offsets", "rank_counts", "present"]


def gpu_of(world):
    torch.cuda.set_device(world.rank % torch.cuda.device_count())
    torch.cuda.set_stream(torch.cuda.Stream())
    return torch.device("cuda", torch.cuda.current_device())


def inputs(rank, dtype=torch.bfloat16):
    rng = torch.Generator().manual_seed(rank + 1)
    x = torch.randn(TOKENS - rank, HIDDEN, generator=rng).to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS, generator=rng)[:TOP_K] for _ in range(len(x))])
    return x, ids, torch.rand(len(x), TOP_K, generator=rng)


def make_exchange(world, device, dtype="bfloat16", **options):
    sms = {"sm_budget": 16} if device == "cuda" else {}
    return ty.Exchange(world, ty.Placement.uniform(EXPERTS, world.size), hidden_size=HIDDEN, top_k=TOP_K, max_tokens_per_rank=TOKENS,
                       dtype=dtype, device=device, timeout_ms=20_000, **sms, **options)


def equal(ours, theirs):
    return (ours is None) == (theirs is None) and (ours is None or torch.equal(ours.cpu(), theirs))


@pytest.mark.parametrize("layout", ["token_major", "expert_major", "expert_padded", "rank_slots"])
@pytest.mark.parametrize("mode", ["throughput", "latency"])
def test_as_on_the_cpu(layout, mode):
    if layout == "rank_slots" and mode == "throughput":
        pytest.skip("rank_slots belong to latency mode")

    def rank_main(world):
        device = gpu_of(world)
        x, ids, weights = inputs(world.rank)
        results = []
        for place in ("cpu", "cuda"):
            exchange = make_exchange(world, place, mode=mode)
            there = [t.to(device if place == "cuda" else "cpu") for t in (x, ids, weights)]
            options = {"expert_capacity": 40} if layout == "expert_padded" else {}
            out = exchange.dispatch(*there, layout=layout, sizing="exact" if mode == "throughput" else None, zero_padding=True, **options)
            assert out.rows.device.type == place
            weighting = "at_expert" if layout.startswith("expert") else "none"
            y = exchange.combine(out.rows.clone(), out.handle, weighting=weighting)
            results.append((out.rows.clone(), [getattr(out, name) for name in FIELDS], y, out.num_rows))
        (rows, fields, y, count), (gpu_rows, gpu_fields, gpu_y, gpu_count) = results
        torch.cuda.current_stream().synchronize()
        assert gpu_count == (count if mode == "throughput" else -1) and torch.equal(gpu_y.cpu(), y)  # -1: only the device knows
        for name, ours, theirs in zip(FIELDS, gpu_fields, fields):
            assert equal(ours, theirs), name
        if layout == "rank_slots":  # slots without a row hold anything
            there = fields[FIELDS.index("present")].bool()
        else:  # as rows beyond the last do, where padding is not zeroed
            there = fields[FIELDS.index("source_rank")] >= 0
            assert layout == "token_major" or not gpu_rows.cpu()[~there].any()
        assert torch.equal(gpu_rows.cpu()[there], rows[there])

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def test_work_is_ordered_on_the_current_stream():
    def rank_main(world):
        device = gpu_of(world)
        x, ids, weights = (t.to(device) for t in inputs(world.rank))
        exchange = make_exchange(world, "cuda")
        expected = exchange.dispatch(x, ids, weights, copy_out=True).rows.clone()
        torch.cuda.current_stream().synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            late = torch.zeros_like(x)
            torch.cuda._sleep(20_000_000)  # what is written behind this is read in time only if dispatch waits for the stream
            late.copy_(x)
            found = exchange.dispatch(late, ids, weights, copy_out=True).rows
            torch.cuda.current_stream().synchronize()
        assert torch.equal(found, expected)

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


@pytest.mark.parametrize("mode", ["throughput", "latency"])
def test_waits_name_who_was_late(mode):
    """Rank 1 is late for dispatches, rank 0 for combines; what is there already stays, and a call that does not ask adds nothing."""
    late_s = 0.2
    options = {"sizing": "capacity", "copy_out": True}  # no lease outlives its call

    def rank_main(world):
        device = gpu_of(world)
        given = [t.to(device) for t in inputs(world.rank)]
        exchange = make_exchange(world, "cuda", mode=mode)
        in_dispatch, in_combine = (torch.full((RANKS,), 5, dtype=torch.int64, device=device) for _ in range(2))

        def late(who, call, *args, **named):
            torch.cuda.current_stream().synchronize()
            world.barrier()
            time.sleep(late_s if world.rank == who else 0)
            return call(*args, **named)

        for _ in range(2):
            out = late(1, exchange.dispatch, *given, **options, waits=in_dispatch)
            late(0, exchange.combine, out.rows, out.handle, waits=in_combine)
            out = late(1, exchange.start_dispatch, *given, **options, waits=in_dispatch).finish()
            late(0, exchange.start_combine, out.rows, out.handle, waits=in_combine).finish()
            out = late(1, exchange.dispatch, *given, **options)
            late(0, exchange.combine, out.rows, out.handle)
        for waits, who in ((in_dispatch.tolist(), 1), (in_combine.tolist(), 0)):
            assert waits[world.rank] == 5 and all(one >= 5 for one in waits)
            if world.rank != who:
                assert waits[who] >= 4 * 0.5e9 * late_s, waits
        with pytest.raises(ty.UsageError, match="a tensor on cpu|takes torch tensors on its GPU"):
            exchange.dispatch(*given, **options, waits=torch.zeros(RANKS, dtype=torch.int64))

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def test_leases_come_back_with_their_last_tensor():
    def rank_main(world):
        device = gpu_of(world)
        given = [t.to(device) for t in inputs(world.rank)]
        exchange = make_exchange(world, "cuda", depth=2)
        for _ in range(20):  # with two buffers, the third dispatch would fail if rows were kept
            rows = exchange.dispatch(*given).rows
            rows.sum()
            del rows
        torch.cuda.current_stream().synchronize()

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def test_gradients_are_those_of_the_cpu():
    def gradients(world, place):
        device = gpu_of(world) if place == "cuda" else torch.device("cpu")
        x, ids, weights = (t.to(device) for t in inputs(world.rank, torch.float32))
        x.requires_grad_(), weights.requires_grad_()
        exchange = make_exchange(world, place, "float32")
        dispatched = tyt.dispatch(exchange, x, ids, weights, layout="expert_major")
        y = tyt.combine(exchange, torch.tanh(dispatched.rows) * dispatched.row_weights[:, None], dispatched)
        (y * torch.arange(HIDDEN, device=device)).sum().backward()
        return [t.detach().cpu() for t in (y, x.grad, weights.grad)]

    def rank_main(world):
        for ours, theirs in zip(gradients(world, "cuda"), gradients(world, "cpu")):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def test_host_memory_is_refused():
    def rank_main(world):
        x, ids, weights = inputs(world.rank)
        device = gpu_of(world)
        exchange = make_exchange(world, "cuda")
        with pytest.raises(ty.UsageError, match="takes torch tensors on its GPU"):
            exchange.dispatch(x.to(device), ids, weights.to(device))

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def test_rows_copied_out_are_memory_of_torch():
    def rank_main(world):
        device = gpu_of(world)
        given = [t.to(device) for t in inputs(world.rank)]
        exchange = make_exchange(world, "cuda", max_scale_bytes=4 * (HIDDEN // 128))
        for layout in ("token_major", "expert_major", "expert_padded"):
            options = {"expert_capacity": 40} if layout == "expert_padded" else {}
            for quantise in (None, "float32", "ue8m0"):
                leased = exchange.dispatch(*given, layout=layout, quantise=quantise, zero_padding=True, **options)
                out = exchange.start_dispatch(*given, layout=layout, quantise=quantise, zero_padding=True, copy_out=True, **options).finish()
                assert out.rows.data_ptr() == out.rows.untyped_storage().data_ptr()
                assert out.rows.untyped_storage().nbytes() == out.rows.nbytes > 0  # a tensor over foreign memory knows no storage but its own
                assert torch.equal(out.rows.view(torch.uint8), leased.rows.view(torch.uint8))
                if quantise is not None:
                    assert out.scales.dtype == leased.scales.dtype and torch.equal(out.scales, leased.scales)
                assert is_of_allocator(out.rows, device) and not is_of_allocator(leased.rows, device)
                y = exchange.combine(torch.zeros(out.rows.shape, device=device).bfloat16(), out.handle)
                assert is_of_allocator(y, device)

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def is_of_allocator(tensor, device):
    at = tensor.data_ptr()
    return any(s["device"] == device.index and s["address"] <= at < s["address"] + s["total_size"] for s in torch.cuda.memory_snapshot())


def test_a_lease_waits_for_the_streams_that_read_it():
    def rank_main(world):
        device = gpu_of(world)
        x, ids, weights = (t.to(device) for t in inputs(world.rank))
        exchange = make_exchange(world, "cuda", depth=1)
        expected = exchange.dispatch(x, ids, weights).rows.clone()
        side = torch.cuda.Stream()
        for _ in range(3):
            out = exchange.dispatch(x, ids, weights)
            side.wait_stream(torch.cuda.current_stream())
            out.record_stream(side)
            found = torch.empty_like(expected)
            with torch.cuda.stream(side):
                torch.cuda._sleep(20_000_000)
                found.copy_(out.rows)
            del out
            exchange.dispatch(torch.zeros_like(x), ids, weights)  # into the same buffer
            side.synchronize()
            assert torch.equal(found, expected)

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"NCCL takes a GPU for each of {RANKS} ranks")


@needs_gpus
def test_kinds_of_the_dispatcher_agree():
    def trained(world, device, kind):
        x, ids, weights = (t.to(device) for t in inputs(world.rank, torch.float32))
        x.requires_grad_(), weights.requires_grad_()
        dispatcher = tyt.MoEDispatcher(world, ty.Placement.uniform(EXPERTS, RANKS), hidden_size=HIDDEN, top_k=TOP_K, max_tokens_per_rank=TOKENS,
                                       dtype="float32", kind=kind, device="cuda", timeout_ms=20_000)
        for async_op in (False, True):
            x.grad = weights.grad = None
            y = dispatcher(x, ids, weights, lambda rows, counts: torch.tanh(rows), async_op=async_op)
            (y * torch.arange(HIDDEN, device=device)).sum().backward()
        torch.cuda.current_stream().synchronize()
        world.barrier()
        return y.detach(), x.grad, weights.grad

    def rank_main(world):
        device = gpu_of(world)
        expected = trained(world, device, "direct")
        for kind in ("all_gather", "all_to_all"):
            for ours, theirs in zip(trained(world, device, kind), expected):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


@needs_gpus
def test_collectives():
    def rank_main(world):
        device = gpu_of(world)
        counts = [3, 0] if world.rank == 0 else [1, 4]  # sent to each
        collectives = ty.Collectives(world, device="cuda", timeout_ms=20_000)
        gathered = collectives.all_gather_v(torch.full((world.rank + 1, 4), float(world.rank), device=device), [1, 2])
        assert gathered[:, 0].tolist() == [0, 1, 1]
        summed = collectives.reduce_scatter_v(torch.arange(12.0, device=device).view(3, 4).bfloat16(), [1, 2])
        assert torch.equal(summed.cpu(), (2 * torch.arange(12.0).view(3, 4)[:1] if world.rank == 0 else 2 * torch.arange(12.0).view(3, 4)[1:]).bfloat16())
        received = collectives.all_to_all_v(torch.full((sum(counts), 2), world.rank, dtype=torch.int64, device=device), counts,
                                            [3, 1] if world.rank == 0 else [0, 4])
        assert received[:, 0].tolist() == ([0, 0, 0, 1] if world.rank == 0 else [1] * 4)
        with pytest.raises(ty.UsageError, match="x is on cpu but these collectives are of device = 'cuda'; move it"):
            collectives.all_gather_v(torch.zeros(1, 4), [1, 2])
        collectives.wait()
        collectives.barrier()

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)
