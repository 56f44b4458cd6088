"""The drop-in with CUDA tensors where ranks are late, silent or masked, and what it refuses there. Its graphs: cuda_graph_test.py."""
import time

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import deep_ep  # noqa: E402
import tokenyard as ty  # noqa: E402
from cuda_graph_test import TOKENS, Batch, captured, low_latency  # noqa: E402
from cuda_test import EXPERTS, RANKS, gpu_of  # noqa: E402
from support import Comm  # noqa: E402

WINDOW = EXPERTS // RANKS


def check_round(buffer, batch, how, alive):
    """A dispatch and a combine among ranks of `alive`, rank 0's part when others are left out, with experts that change nothing."""
    _, sums, handle, counts = low_latency(buffer, batch, how, False)
    answered = torch.isin(batch.ids // WINDOW, torch.tensor(alive, device=batch.ids.device)) & (batch.ids >= 0)
    wanted = batch.x.float() * torch.where(answered, batch.weights, 0).sum(1, keepdim=True)
    torch.testing.assert_close(sums.float(), wanted, rtol=0.03, atol=0.03)
    if alive == [0]:
        assert counts.tolist() == [(batch.ids == e).sum().item() for e in range(WINDOW)]
        assert (handle[1][:, 1:] == 0).all()


def masked(buffer, device):
    status = torch.full((RANKS,), 7, dtype=torch.int32, device=device)
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


@pytest.mark.parametrize("how", ["plain", "async", "hook"])
def test_enable_shrink(how, monkeypatch):
    """Rank 1 is silent, then is masked by hand, and is taken back each time."""
    monkeypatch.setenv("TOKENYARD_TIMEOUT_MS", "2000")
    everybody = list(range(RANKS))

    def rank_main(world):
        device = gpu_of(world)
        batch, buffer = Batch(device, world.rank), deep_ep.Buffer(comm=Comm(world), low_latency_mode=True, enable_shrink=True)
        check_round(buffer, batch, how, everybody)
        for by_hand in (False, True):
            if world.rank == 0:
                if by_hand:
                    buffer.low_latency_update_mask_buffer(1, True)
                check_round(buffer, batch, how, [0])
                assert masked(buffer, device) == [0, 1]
                check_round(buffer, batch, how, [0])
                with pytest.raises(ty.UsageError, match="rank 1 is masked and has left this buffer's memory"):
                    buffer.low_latency_update_mask_buffer(1, False)
            world.barrier()
            buffer.low_latency_clean_mask_buffer()
            assert masked(buffer, device) == [0, 0]
            check_round(buffer, batch, how, everybody)

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


@pytest.mark.parametrize("how", ["plain", "async", "hook"])
def test_wait_costs_name_who_was_late(how):
    """Rank 1 is late for dispatches, rank 0 for combines; replays of a graph add as calls do."""
    late_s = 0.2

    def rank_main(world):
        device = gpu_of(world)
        batch, buffer = Batch(device, world.rank), deep_ep.Buffer(comm=Comm(world), low_latency_mode=True)
        options = {"hook": {"return_recv_hook": True}, "async": {"async_finish": True}, "plain": {}}[how]
        in_dispatch, in_combine = torch.zeros(2, RANKS, dtype=torch.int64, device=device)

        def late(who):
            torch.cuda.current_stream().synchronize()
            world.barrier()
            time.sleep(late_s if world.rank == who else 0)

        def end(event, hook):
            hook() if hook else event.current_stream_wait() if event.event else None

        def dispatch():
            rows, _, handle, *rest = buffer.low_latency_dispatch(batch.x, batch.ids, TOKENS, EXPERTS, use_fp8=False,
                                                                 dispatch_wait_recv_cost_stats=in_dispatch, **options)
            end(*rest)
            return rows, handle

        def combine(rows, handle):
            _, *rest = buffer.low_latency_combine(rows, batch.ids, batch.weights, handle, combine_wait_recv_cost_stats=in_combine, **options)
            end(*rest)

        rounds, replays = 2, 2
        for _ in range(rounds):
            late(1)
            rows, handle = dispatch()
            late(0)
            combine(rows, handle)
        graph, _ = captured(world, lambda: combine(*dispatch()))
        for _ in range(replays):
            late(1)
            graph.replay()
        torch.cuda.current_stream().synchronize()
        for waits, who, calls in ((in_dispatch, 1, rounds + replays), (in_combine, 0, rounds)):
            assert waits[world.rank] == 0
            if world.rank != who:
                assert waits[who] >= calls * 0.5e9 * late_s, waits

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def test_what_is_refused():
    """Before anything is sent, so that the next call is fine; the second one is told to the peers."""
    def rank_main(world):
        device = gpu_of(world)
        batch, buffer = Batch(device, world.rank), deep_ep.Buffer(comm=Comm(world), low_latency_mode=True)
        stats = torch.zeros(RANKS, dtype=torch.int32, device=device)
        if world.rank == 0:
            with pytest.raises(ty.UsageError, match=r"waits is \[2\] int32; expected \[2\] int64"):
                buffer.low_latency_dispatch(batch.x, batch.ids, TOKENS, EXPERTS, dispatch_wait_recv_cost_stats=stats)
        else:
            with pytest.raises(ty.TransportError, match=r"waits is \[2\] int32"):
                low_latency_refused(buffer, batch, TOKENS)
        check_round(buffer, batch, "plain", list(range(RANKS)))
        if world.rank == 0:
            with pytest.raises(ty.UsageError, match=f"{TOKENS} tokens; num_max_dispatch_tokens_per_rank is {TOKENS - 1}"):
                buffer.low_latency_dispatch(batch.x, batch.ids, TOKENS - 1, EXPERTS, use_fp8=False)
        else:
            with pytest.raises(ty.TransportError, match=f"{TOKENS} tokens; num_max_dispatch_tokens_per_rank is {TOKENS - 1}"):
                low_latency_refused(buffer, batch, TOKENS - 1)
        check_round(buffer, batch, "plain", list(range(RANKS)))

    ty.run_ranks(rank_main, RANKS, processes=False, timeout_ms=60_000)


def low_latency_refused(buffer, batch, max_tokens):
    """The error of a call that was only enqueued is told by the first one that sees it."""
    buffer.low_latency_dispatch(batch.x, batch.ids, max_tokens, EXPERTS, use_fp8=False)
    torch.cuda.current_stream().synchronize()
    buffer._low_latency_room.exchange.check()
