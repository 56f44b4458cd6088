"""The deep_ep drop-in on CPU ranks with a gloo group, against plain loops; ElasticBuffer: deep_ep_elastic_test.py. DeepEP's own test
programs are run by hand: docs/deep_ep.md."""
import io
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import tokenyard as ty  # noqa: E402
from deep_ep_ranks import EXPERTS, HIDDEN, RANKS, TOKENS, TOP_K, WINDOW, given, on_group, received_by, stack  # noqa: E402
from support import Comm, on_ranks  # noqa: E402


def check_v1(group, rank, with_topk, fp8):
    import deep_ep

    x, ids, weights = given()
    buffer = deep_ep.Buffer(group, int(1e6))
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids[rank], EXPERTS)
    assert per_rank.tolist() == [sum((s, t) in received_by(to, ids) for s, t in [(rank, t) for t in range(TOKENS[rank])]) for to in range(RANKS)]
    assert per_node is None and per_expert.tolist() == [(ids[rank] == e).sum().item() for e in range(EXPERTS)]
    assert in_rank.shape == (TOKENS[rank], RANKS) and in_rank.sum(0).tolist() == per_rank.tolist()
    rows = received_by(rank, ids)
    payload = (x[rank].to(torch.float8_e4m3fn), torch.arange(2.0 * TOKENS[rank]).view(2, -1).T) if fp8 else x[rank]
    topk = {"topk_idx": ids[rank], "topk_weights": weights[rank]} if with_topk else {}
    args = dict(num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, expert_alignment=4, **topk)
    recv_x, recv_ids, recv_weights, counts, handle, event = buffer.dispatch(payload, **args, async_finish=True, previous_event=buffer.capture())
    event.current_stream_wait()
    expected = stack([x[s][t] for s, t in rows], x[rank])
    assert torch.equal((recv_x[0] if fp8 else recv_x).bfloat16(), expected)
    if fp8:
        assert torch.equal(recv_x[1], stack([torch.tensor([t, TOKENS[s] + t]).float() for s, t in rows], recv_x[1]))
    true_counts = [sum((i == rank * WINDOW + e).sum().item() for i in ids) for e in range(WINDOW)]
    assert counts == [(c + 3) // 4 * 4 for c in true_counts]
    prefix = handle[0]
    assert prefix.shape == (RANKS, RANKS) and prefix[-1, rank] == len(rows) and all(isinstance(t, torch.Tensor) for t in handle)
    assert handle[3].tolist() == [t for s, t in rows]
    if with_topk:
        local = [[e - rank * WINDOW if e >= 0 and e // WINDOW == rank else -1 for e in ids[s][t].tolist()] for s, t in rows]
        assert recv_ids.tolist() == local and recv_ids.dtype == torch.int64
        assert torch.equal(recv_weights, stack([torch.where(torch.tensor(l) >= 0, weights[s][t], 0.0) for l, (s, t) in zip(local, rows)], recv_weights))
        worst = buffer.dispatch(payload, **args, num_worst_tokens=20)
        assert worst[1].shape == (20, TOP_K) and worst[3] == [] and (worst[1][len(rows):] == -1).all()
        assert torch.equal(worst[1][:len(rows)], recv_ids)
    else:
        assert recv_ids is None and recv_weights is None
    check_v1_back(buffer, x[rank], weights[rank], in_rank, expected, handle)
    return len(rows)


def check_v1_back(buffer, x, weights, in_rank, recv_x, handle):
    """Cached dispatch and combine, also when all that is left of the handle is copies of its tensors."""
    times = in_rank.sum(1, keepdim=True)
    stored = io.BytesIO()
    torch.save(handle, stored)
    stored.seek(0)
    copies = torch.load(stored)
    for known in (handle, tuple(t.clone() for t in handle), copies):
        again, none, _, _, no_handle, _ = buffer.dispatch(x, handle=known)
        assert torch.equal(again, recv_x) and none is None and no_handle is None
        bias = torch.ones_like(x)
        factors = torch.ones(recv_x.shape[0], 2) / 2
        sums, summed, _ = buffer.combine(recv_x, known, topk_weights=factors, bias=(bias, bias))
        assert torch.equal(sums, x * times + 2) and torch.equal(summed, times.expand(-1, 2) / 2)
        buffer._handles.clear()  # what is remembered may be gone: tensors are enough


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("with_topk", [False, True])
def test_buffer(with_topk, fp8, tmp_path):
    _, ids, _ = given()
    assert on_group(lambda group, rank: check_v1(group, rank, with_topk, fp8), tmp_path) == [len(received_by(rank, ids)) for rank in range(RANKS)]


def test_more_than_eight_ranks():
    """There the handle is the tuple of ten tensors of DeepEP's internode kernels; nodes are groups of 8 ranks, the last one maybe smaller."""
    ranks, tokens = 10, 6

    def main(world):
        import deep_ep

        rank = world.rank
        x = torch.full((tokens, 32), float(rank + 1)).bfloat16()
        ids = (torch.arange(tokens)[:, None] * 3 + torch.tensor([[0, 7]]) + rank) % (2 * ranks)
        buffer = deep_ep.Buffer(comm=Comm(world))
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 2 * ranks)
        assert per_node.tolist() == [in_rank[:, :8].any(1).sum(), in_rank[:, 8:].any(1).sum()]
        everybody = [pickle.loads(one) for one in world.all_gather(pickle.dumps(in_rank.tolist()))]
        expected = [(s, t) for s in range(ranks) for t in range(tokens) if everybody[s][t][rank]]
        given = dict(num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert,
                     topk_idx=ids, topk_weights=torch.ones(tokens, 2), config=deep_ep.Config(8))
        for worst in (0, ranks * tokens):
            rows, recv_ids, _, _, handle, _ = buffer.dispatch(x, **given, num_worst_tokens=worst)
            count, length = len(expected), worst or len(expected)
            assert torch.equal(rows[:count, 0].float(), torch.tensor([s + 1.0 for s, _ in expected])) and len(rows) == len(recv_ids) == length
            sums = [sum(s < end for s, _ in expected) for end in range(1, ranks + 1)]
            assert torch.equal(handle[0], in_rank) and handle[6].tolist() == sums and handle[4].tolist() == [sums[7], sums[9]]
            meta = handle[7].view(torch.int32)
            assert meta[:count].tolist() == [[s // 8, t] for s, t in expected] and (meta[count:] == -1).all()
            assert [list(t.shape) for t in handle] == [[tokens, ranks], [2, 4], [ranks, 4], [2, 4], [2], [ranks, 4], [ranks], [length, 8], [tokens, 2],
                                                       [length, 8]]
            for known in (handle, tuple(t.clone() for t in handle)):
                assert torch.equal(buffer.combine(rows, known)[0], x * in_rank.sum(1, keepdim=True))
                assert torch.equal(buffer.dispatch(x, handle=known)[0][:count], rows[:count])
                buffer._handles.clear()  # what is remembered may be gone: tensors are enough

    on_ranks(main, ranks)


def test_buffer_grows_and_old_handles_stay_good(tmp_path):
    def main(group, rank):
        import deep_ep

        buffer = deep_ep.Buffer(group)
        handles = []
        for tokens in (2, 30):
            x = torch.full((tokens, 32), float(rank + 1)).bfloat16()
            ids = torch.arange(tokens * TOP_K).view(tokens, TOP_K) % EXPERTS
            layout = buffer.get_dispatch_layout(ids, EXPERTS)
            out = buffer.dispatch(x, None, layout[0], None, layout[3], layout[2], ids, torch.ones(tokens, TOP_K))
            handles.append((x, layout[3], out[0], out[4]))
        for x, in_rank, recv_x, handle in handles:
            assert torch.equal(buffer.combine(recv_x, handle)[0], x * in_rank.sum(1, keepdim=True))

    on_group(main, tmp_path)


def check_low_latency(group, rank, hook, fp8, scale_kind):
    import deep_ep
    from deep_ep.utils.math import per_token_cast_back

    x, ids, weights = given(2)
    slots = 8
    buffer = deep_ep.Buffer(group, 0, deep_ep.Buffer.get_low_latency_rdma_size_hint(slots, HIDDEN, RANKS, EXPERTS), low_latency_mode=True,
                            explicitly_destroy=True)
    stats = torch.zeros(WINDOW, dtype=torch.int32)
    live = []
    for _ in range(4):  # more than two: results are the caller's
        recv, counts, handle, event, finish = buffer.low_latency_dispatch(
            x[rank], ids[rank], slots, EXPERTS, stats, use_fp8=fp8, round_scale=scale_kind != "float32", use_ue8m0=scale_kind == "ue8m0",
            return_recv_hook=hook, async_finish=not hook)
        finish() if hook else event.current_stream_wait()
        assert (event.event is None) == hook
        live.append(recv)
    source, ranges, *shape = handle
    assert shape == [slots, HIDDEN, EXPERTS] and stats.tolist() == (4 * counts).tolist()
    rows = recv
    if fp8:
        assert recv[1].shape[:2] == (WINDOW, RANKS * slots) and recv[1].stride(1) == 1
        rows = torch.stack([per_token_cast_back(recv[0][e], recv[1][e]) for e in range(WINDOW)])
    for e in range(WINDOW):
        expected = [(s, t) for s in range(RANKS) for t in range(TOKENS[s]) if rank * WINDOW + e in ids[s][t].tolist()]
        assert counts[e] == len(expected) and source[e, :len(expected)].tolist() == [t for s, t in expected]
        begins = [(int(r) >> 32, int(r) & 0xFFFFFFFF) for r in ranges[e]]
        assert [c for _, c in begins] == [sum(s == r for s, t in expected) for r in range(RANKS)]
        assert all(begin == sum(c for _, c in begins[:r]) for r, (begin, count) in enumerate(begins) if count)
        want = stack([x[s][t] for s, t in expected], x[rank])
        torch.testing.assert_close(rows[e, :len(expected)], want, rtol=0.07, atol=0.02)
    exact = torch.zeros_like(rows)
    for e in range(WINDOW):
        for i, (s, t) in enumerate([(s, t) for s in range(RANKS) for t in range(TOKENS[s]) if rank * WINDOW + e in ids[s][t].tolist()]):
            exact[e, i] = x[s][t]
    wanted = x[rank] * torch.where(ids[rank] >= 0, weights[rank], 0.0).sum(1, keepdim=True)
    for zero_copy in (False, True):
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(handle)[:] = exact
        out = torch.empty_like(x[rank])
        sums, event, finish = buffer.low_latency_combine(exact, ids[rank], weights[rank], handle, zero_copy=zero_copy, return_recv_hook=hook, out=out)
        finish() if hook else None
        assert sums is out
        torch.testing.assert_close(sums, wanted.bfloat16(), rtol=0.01, atol=0.01)
    buffer.destroy()


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("fp8, scale_kind", [(False, "float32"), (True, "float32"), (True, "pow2"), (True, "ue8m0")])
def test_low_latency(hook, fp8, scale_kind, tmp_path):
    on_group(lambda group, rank: check_low_latency(group, rank, hook, fp8, scale_kind), tmp_path)


@pytest.mark.parametrize("hook", [False, True])
def test_wait_costs_name_who_was_late(hook, tmp_path):
    """Rank 2 is late for the second of three dispatches, rank 0 for each combine; what was not asked for is not told later."""
    late_s = 0.5

    def main(group, rank):
        import deep_ep

        x, ids, weights = given(6)
        buffer = deep_ep.Buffer(group, low_latency_mode=True)
        in_dispatch, in_combine = torch.zeros(2, RANKS, dtype=torch.int64)
        for turn in range(3):
            group.barrier().wait()
            time.sleep(late_s if rank == 2 and turn < 2 else 0)
            rows, _, handle, _, finish = buffer.low_latency_dispatch(
                x[rank], ids[rank], 8, EXPERTS, use_fp8=False, return_recv_hook=hook, dispatch_wait_recv_cost_stats=in_dispatch if turn else None)
            finish() if hook else None
            group.barrier().wait()
            time.sleep(late_s if rank == 0 else 0)
            _, _, finish = buffer.low_latency_combine(rows, ids[rank], weights[rank], handle, return_recv_hook=hook,
                                                      combine_wait_recv_cost_stats=in_combine)
            finish() if hook else None
        return in_dispatch.tolist(), in_combine.tolist()

    for rank, waits in enumerate(on_group(main, tmp_path)):
        for waited, late, times in zip(waits, (2, 0), (1, 3)):
            for peer in range(RANKS):
                least = 0.8e9 * times * late_s
                assert (waited[peer] > least) == (peer == late != rank) and waited[peer] < 5 * least, (rank, waits)


def alive_sums(x, ids, weights, rank, alive):
    """What identity experts give a rank when only those of `alive` answer."""
    there = torch.tensor([e >= 0 and int(e) // WINDOW in alive for e in ids[rank].flatten()], dtype=torch.bool).view(ids[rank].shape)
    return (x[rank].float() * torch.where(there, weights[rank], 0.0).sum(1, keepdim=True)).bfloat16()


def check_shrink(group, rank, hook, silent_in):
    """Rank 1 is silent from its first dispatch, or combine, on; the others go on without it, and take it back."""
    import deep_ep

    x, ids, weights = given(4)
    slots, alive = 8, [0, 2]
    buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True)
    status = torch.zeros(RANKS, dtype=torch.int32)
    stats = torch.zeros(RANKS, dtype=torch.int64)

    def dispatch():
        rows, counts, handle, _, finish = buffer.low_latency_dispatch(x[rank], ids[rank], slots, EXPERTS, use_fp8=False, return_recv_hook=hook,
                                                                      dispatch_wait_recv_cost_stats=stats)
        finish() if hook else None
        return rows.clone(), counts, handle

    def combine(rows, handle):
        sums, _, finish = buffer.low_latency_combine(rows, ids[rank], weights[rank], handle, return_recv_hook=hook)
        finish() if hook else None
        return sums

    def counted(ranks):
        return [sum(e == rank * WINDOW + i for s in ranks for e in ids[s].flatten().tolist()) for i in range(WINDOW)]

    if rank == 1:
        if silent_in == "combine":
            dispatch()
    else:
        rows, counts, handle = dispatch()
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, silent_in == "dispatch", 0]
        assert counts.tolist() == counted(alive if silent_in == "dispatch" else range(RANKS))
        torch.testing.assert_close(combine(rows, handle), alive_sums(x, ids, weights, rank, alive))
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 1, 0]
        torch.testing.assert_close(combine(rows, handle), alive_sums(x, ids, weights, rank, alive))  # an old handle serves again
        buffer.clean_low_latency_buffer(slots, HIDDEN, EXPERTS)
        before = stats.tolist()
        time.sleep(0.2 if rank == 2 else 0)
        rows, counts, handle = dispatch()
        assert stats[rank] == 0 and stats[1] == before[1] and (rank == 2 or stats[2] >= before[2] + 0.1e9)
        assert counts.tolist() == counted(alive) and all(int(pair) == 0 for pair in handle[1][:, 1])
        with pytest.raises(ty.UsageError, match="rank 1 is masked and has left"):
            buffer.low_latency_update_mask_buffer(1, False)
        with pytest.raises(ty.UsageError, match=f"rank_to_mask = {rank} on rank {rank} of 3"):
            buffer.low_latency_update_mask_buffer(rank, True)
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    rows, counts, handle = dispatch()
    assert status.tolist() == [0, 0, 0] and counts.tolist() == counted(range(RANKS))
    torch.testing.assert_close(combine(rows, handle), alive_sums(x, ids, weights, rank, range(RANKS)))


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("silent_in", ["dispatch", "combine"])
def test_enable_shrink(hook, silent_in, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENYARD_TIMEOUT_MS", "1500")
    on_group(lambda group, rank: check_shrink(group, rank, hook, silent_in), tmp_path)


def check_refusals(group, rank, x, ids, in_rank, wrong, per_expert):
    """What rank 0 refuses without asking anybody: rank 1, which is in the same call, learns it, and the next call is fine."""
    import deep_ep

    buffer = deep_ep.Buffer(group)
    rows, _, _, _, handle, _ = buffer.dispatch(x, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=ids, topk_weights=torch.ones(2, 1))
    large = buffer.get_dispatch_layout(ids + 2, 2)  # the dispatch tells
    assert large[0].tolist() == [0, 0] and large[2].tolist() == [0, 0]
    more, more_ids = torch.ones(3, 32).bfloat16(), torch.zeros(3, 1).long()
    for call, text in [
        (lambda bad: buffer.dispatch(x, is_token_in_rank=wrong if bad else in_rank, num_tokens_per_expert=per_expert, topk_idx=ids, num_worst_tokens=4),
         r"is_token_in_rank\[1\] = .* but topk_idx\[1\] = \[1\] of 2 experts"),
        (lambda bad: buffer.dispatch(more if bad else x, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=more_ids if bad else ids,
                                     num_worst_tokens=4), "num_worst_tokens = 4 for 2 ranks leaves 2 tokens to each, and this rank has 3"),
        (lambda bad: buffer.low_latency_dispatch(more if bad else x, more_ids if bad else ids, 2, 2, use_fp8=False), "3 tokens; num_max"),
        (lambda bad: buffer.combine(rows[:1] if bad else rows, handle), r"x is \[1, 32\]; expected 2 rows, as the dispatch of this handle gave"),
        (lambda bad: buffer.combine(rows, handle, rows[:1, :1].float() if bad else rows[:, :1].float()), r"topk_weights is \[1, 1\]; expected 2 rows"),
    ]:
        with pytest.raises(ty.UsageError if rank == 0 else ty.TransportError, match=text):
            call(rank == 0)
        call(False)


def test_calls_outside_autograd(tmp_path):
    """In inference mode and without gradients as otherwise; what comes out has no history, also of inputs that want gradients. Every event is
    waited for."""
    def main(group, rank):
        import deep_ep

        class Seen(deep_ep.EventHandle):
            times = 0

            def current_stream_wait(self):
                Seen.times += 1

        def run():
            all_x, all_ids, all_weights = given(8)
            x, weights, ids = all_x[rank].requires_grad_(not torch.is_inference_mode_enabled()), all_weights[rank], all_ids[rank]
            legacy, elastic = deep_ep.Buffer(group, low_latency_mode=True), deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=7)
            per_rank, _, per_expert, in_rank, _ = legacy.get_dispatch_layout(ids, EXPERTS, previous_event=deep_ep.EventOverlap(Seen()))
            rows, recv_ids, recv_weights, _, handle, _ = legacy.dispatch(x, None, per_rank, None, in_rank, per_expert, ids, weights, previous_event=Seen())
            sums, summed, _ = legacy.combine(rows, handle, recv_weights, bias=x, previous_event=deep_ep.EventOverlap(None))
            found = [rows, recv_weights, sums, summed]
            rows, _, handle, *_ = legacy.low_latency_dispatch(x, ids, 7, EXPERTS, use_fp8=False)
            found += legacy.low_latency_combine(rows, ids, weights, handle)[0],
            for expand in (0, 1):
                rows, _, recv_weights, handle, _ = elastic.dispatch(x, ids, weights, num_experts=EXPERTS, do_expand=expand, previous_event=Seen(),
                                                                    previous_event_before_epilogue=Seen())
                found += elastic.combine(rows, handle, recv_weights, previous_event_before_epilogue=deep_ep.EventOverlap(Seen()))[:2]
            assert not any(one.requires_grad for one in found)
            return found

        usual = run()
        assert Seen.times == 8
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(), usual))

    on_group(main, tmp_path)


def test_memory_of_the_size_asked_for(tmp_path):
    def main(group, rank):
        import deep_ep

        buffer = deep_ep.Buffer(group, 64, 128)
        assert buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size([4, 2]), offset=16).fill_(1).sum() == 8
        assert buffer.get_local_buffer_tensor(torch.float32, use_rdma_buffer=True).shape == (32,)
        with pytest.raises(ty.UsageError, match=r"80 bytes at offset 0, num_nvl_bytes = 64"):
            buffer.get_local_buffer_tensor(torch.float64, torch.Size([10]))

    on_group(main, tmp_path, 1)


def test_errors_name_the_value(tmp_path):
    def main(group, rank):
        import deep_ep

        buffer = deep_ep.Buffer(group)
        x, ids = torch.ones(2, 32).bfloat16(), torch.tensor([[0], [1]])
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 2)
        low_latency_handle = buffer.low_latency_dispatch(x, ids, 2, 2, use_fp8=False)[2]
        wrong = in_rank.clone()
        wrong[1] = ~wrong[1]
        for call, text in [
            (lambda: buffer.dispatch(x, is_token_in_rank=wrong, num_tokens_per_expert=per_expert, topk_idx=ids), r"is_token_in_rank\[1\]"),
            (lambda: buffer.dispatch(x), "without is_token_in_rank"),
            (lambda: buffer.dispatch(x, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, num_worst_tokens=9), "num_worst_tokens = 9"),
            (lambda: buffer.get_dispatch_layout(ids, 3), "num_experts = 3 on 2 ranks"),
            (lambda: buffer.destroy(), "without explicitly_destroy"),
            (lambda: buffer.dispatch(x, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=ids[:1]),
             r"is_token_in_rank is \[2, 2\], topk_idx \[1, 1\]; expected a row of 2 for each token"),
            (lambda: buffer.dispatch(x, handle=(x, x)), "handle is a tuple of 2; expected the tuple of 6 tensors"),
            (lambda: buffer.combine(x, None), "handle is a NoneType; expected the tuple of 6 tensors"),
            (lambda: buffer.low_latency_combine(x, ids, x, low_latency_handle, zero_copy=True), "zero_copy without rows"),
            (lambda: buffer.low_latency_dispatch(x, ids, 1, 2), "2 tokens; num_max_dispatch_tokens_per_rank is 1"),
            (lambda: buffer.low_latency_dispatch(x, ids, 2, 2, use_ue8m0=True), "use_ue8m0 without round_scale"),
            (lambda: buffer.low_latency_dispatch(x, ids, 2, 2, async_finish=True, return_recv_hook=True), "choose one"),
            (lambda: buffer.low_latency_update_mask_buffer(1, True), "enable_shrink=True"),
            (lambda: buffer.low_latency_query_mask_buffer(torch.zeros(2, dtype=torch.int32)), "enable_shrink=True"),
            (lambda: buffer.low_latency_clean_mask_buffer(), "enable_shrink=True"),
        ]:
            with pytest.raises(ty.UsageError, match=text):
                call()
        chosen, text = (wrong, r"^is_token_in_rank\[1\]") if rank == 0 else (in_rank, r"rank 0 rejected this call: is_token_in_rank\[1\]")
        with pytest.raises(ty.UsageError, match=text):
            buffer.dispatch(x, is_token_in_rank=chosen, num_tokens_per_expert=per_expert, topk_idx=ids)
        check_refusals(group, rank, x, ids, in_rank, wrong, per_expert)
        with pytest.raises(RuntimeError, match="nothing to wait for"):
            deep_ep.EventOverlap().current_stream_wait()

    on_group(main, tmp_path, 2)


def test_names_that_callers_import():
    import deep_ep
    import deep_ep_cpp
    from deep_ep.utils import EventHandle, EventOverlap

    assert deep_ep.EventHandle is EventHandle and deep_ep.EventOverlap is EventOverlap and deep_ep_cpp.Config is deep_ep.Config
    assert deep_ep.topk_idx_t == torch.int64 and not hasattr(deep_ep, "HybridEPBuffer")
    with EventOverlap(EventHandle())() as event:
        assert event.extra_tensors is None
    assert deep_ep.Buffer.get_dispatch_config(4).get_nvl_buffer_size_hint(1024, 4) > 0


def test_helpers_of_the_test_programs():
    from deep_ep.utils import gate, math, refs

    assert (math.align(5, 4), math.ceil_div(5, 4), math.safe_div(0, 0), math.count_bytes((torch.zeros(3), None), torch.zeros(2))) == (8, 2, 0, 20)
    x = torch.randn(5, 200).bfloat16()
    q, scales = math.per_token_cast_to_fp8(x)
    assert q.shape == (5, 200) and scales.shape == (5, 2) and math.calc_diff(math.per_token_cast_back(q, scales), x) < 1e-3
    rows = torch.tensor([[2, 2, 0], [-1, 1, -1]])
    math.inplace_unique(rows, 3)
    assert rows.tolist() == [[2, 0, -1], [1, -1, -1]]
    assert math.create_grouped_scores(torch.ones(1, 4), torch.tensor([[1]]), 2).tolist() == [[0, 0, 1, 1]]
    for precise in (0, 1):
        chosen = gate.get_unbalanced_scores(2000, 16, 4, 2, 2.0, precise).topk(2).indices // 4
        per_rank = torch.nn.functional.one_hot(chosen, 4).amax(1).sum(0).float()
        assert abs(per_rank[0] / per_rank[1:].mean() - 2) < 0.2
    data = torch.tensor([[[1.0], [2.0]]])
    assert refs.ordered_accumulate(data, torch.tensor([[0.5]])).item() == 3.5


class _Dispatch(torch.autograd.Function):
    """How trainers wrap Buffer: dispatch forward, combine backward, through the tensors of the handle."""

    @staticmethod
    def forward(ctx, x, weights, ids, buffer, kept):
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(ids, EXPERTS)
        recv_x, recv_ids, recv_weights, _, handle, event = buffer.dispatch(
            x, topk_idx=ids, topk_weights=weights, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert, previous_event=event)
        ctx.buffer = buffer
        ctx.save_for_backward(*handle)
        kept += recv_ids, handle
        return recv_x, recv_weights

    @staticmethod
    def backward(ctx, grad_x, grad_weights):
        grad_x, grad_weights, _ = ctx.buffer.combine(grad_x.contiguous(), ctx.saved_tensors, topk_weights=grad_weights.float())
        return grad_x, grad_weights, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, buffer, handle):
        ctx.buffer = buffer
        ctx.save_for_backward(*handle)
        return buffer.combine(x, handle=handle)[0]

    @staticmethod
    def backward(ctx, grad):
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.saved_tensors)[0], None, None


def test_a_training_step_as_trainers_make_it(tmp_path):
    """Gradients of rows and weights through both, against a dense layer; float32, so that they are exact enough to compare."""
    def main(group, rank):
        import deep_ep

        all_x, all_ids, all_weights = given(5)
        x, weights, ids = all_x[rank].float().requires_grad_(), all_weights[rank].clone().requires_grad_(), all_ids[rank]
        factors = 1.0 + torch.arange(EXPERTS)
        kept = []
        buffer = deep_ep.Buffer(group)
        recv_x, recv_weights = _Dispatch.apply(x, weights, ids, buffer, kept)
        recv_ids, handle = kept
        mine = factors[(recv_ids + rank * WINDOW).clamp(min=0)] * (recv_ids >= 0) * recv_weights
        y = _Combine.apply((mine.sum(1, keepdim=True) * recv_x.square()), buffer, handle)
        wanted = (factors[ids.clamp(min=0)] * (ids >= 0) * weights).sum(1, keepdim=True) * x.square()
        torch.testing.assert_close(y, wanted)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(rank))
        for ours, theirs in zip(torch.autograd.grad(y, (x, weights), upstream), torch.autograd.grad(wanted, (x, weights), upstream)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
        return y.shape[0]

    assert on_group(main, tmp_path) == TOKENS


def test_deep_ep_itself_is_not_shadowed(tmp_path):
    """Where DeepEP is installed the drop-in is neither built nor imported."""
    info = tmp_path / "deep_ep-1.2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deep_ep\nVersion: 1.2.1\n", encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", "import deep_ep"], env=env, capture_output=True, text=True, timeout=60)
    assert "ImportError: DeepEP 1.2.1 is installed, and this drop-in of tokenyard has its name: pip uninstall deep_ep" in done.stderr
    build = f"import sysconfig, runpy; sysconfig.get_paths = lambda: dict.fromkeys(('purelib', 'platlib'), {str(tmp_path)!r}); runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", build], cwd=Path(__file__).parents[2] / "python", capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "its package is named deep_ep, too: pip uninstall deep_ep first" in done.stderr
