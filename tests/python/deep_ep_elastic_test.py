"""ElasticBuffer of the deep_ep drop-in on CPU ranks with a gloo group, against plain loops."""
import pytest

torch = pytest.importorskip("torch")

import tokenyard as ty  # noqa: E402
from deep_ep_ranks import EXPERTS, HIDDEN, RANKS, TOKENS, TOP_K, WINDOW, given, on_group  # noqa: E402


def check_elastic(group, rank, expand, cpu_sync, alignment, multiple):
    import deep_ep
    from deep_ep.utils.refs import dispatch as reference

    x, ids, weights = given(3)
    most = 7
    buffer = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=most, hidden=HIDDEN, allow_multiple_reduction=multiple, explicitly_destroy=True)
    stats = torch.zeros(WINDOW, dtype=torch.int32)
    buffer.dispatch(x[rank], ids[rank], num_experts=EXPERTS, num_max_tokens_per_rank=most + 2)  # bounds are those of a call, not of what there is room for
    recv_x, recv_ids, recv_weights, handle, event = buffer.dispatch(
        x[rank], ids[rank], weights[rank], stats, num_experts=EXPERTS, expert_alignment=alignment, do_expand=expand, do_cpu_sync=int(cpu_sync),
        async_with_compute_stream=1, previous_event=buffer.capture(), do_zero_padding=True)
    event.current_stream_wait()
    want_x, want_ids, want_weights, want_source, want_counts = reference(x[rank], ids[rank], weights[rank], most, EXPERTS)
    count = len(want_source)
    assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == want_counts.cumsum(0).tolist()
    assert handle.recv_src_metadata[:count, 0].tolist() == want_source.tolist()
    true_counts = [(want_ids == e).sum().item() for e in range(WINDOW)]
    assert stats.tolist() == true_counts == handle.num_unaligned_recv_tokens_per_expert.tolist()
    assert handle.num_recv_tokens_per_expert_list == ([(c + alignment - 1) // alignment * alignment for c in true_counts] if cpu_sync else [])
    assert handle.dst_buffer_slot_idx.shape == ids[rank].shape
    tokens = count if cpu_sync else most * RANKS
    assert handle.num_recv_tokens == tokens and handle.recv_src_metadata.shape == (tokens, 2 + TOP_K)
    assert (handle.recv_src_metadata[:, 1] == -1).all() and (handle.recv_src_metadata[count:] == -1).all()
    if expand:
        aligned = sum((c + alignment - 1) // alignment * alignment for c in true_counts)
        bound = -(-(tokens * min(TOP_K, WINDOW) + (alignment - 1) * WINDOW) // alignment) * alignment
        assert recv_x.shape[0] == recv_weights.shape[0] == handle.num_expanded_tokens == (aligned if cpu_sync else bound)
    else:
        assert recv_x.shape[0] == recv_ids.shape[0] == recv_weights.shape[0] == tokens and (recv_ids[count:] == -1).all()
    if expand:
        at = handle.recv_src_metadata[:count, 2:].long()
        assert recv_ids is None and torch.equal(at >= 0, want_ids >= 0)
        token, k = (at >= 0).nonzero().T
        assert torch.equal(recv_x[at[token, k]], want_x[token]) and torch.equal(recv_weights[at[token, k]], want_weights[token, k])
        end = handle.psum_num_recv_tokens_per_expert.tolist()
        for e in range(WINDOW):
            assert (at[want_ids == e].sort().values == torch.arange(end[e] - true_counts[e], end[e])).all()
            assert (recv_x[end[e]:(end[e] + alignment - 1) // alignment * alignment] == 0).all()
        y = recv_x
    else:
        assert torch.equal(recv_x[:count], want_x) and torch.equal(recv_ids[:count], want_ids) and torch.equal(recv_weights[:count], want_weights)
        y = recv_x.clone()
        y[:count] *= (want_ids >= 0).sum(1, keepdim=True)
    sums, back, _ = buffer.combine(y, handle, topk_weights=recv_weights if multiple or not expand else None)
    assert torch.equal(sums, x[rank] * (ids[rank] >= 0).sum(1, keepdim=True))
    if back is not None:
        assert torch.equal(back, torch.where(ids[rank] >= 0, weights[rank], 0.0))
    again = buffer.dispatch(x[rank] * 2, topk_weights=weights[rank] * 2, handle=handle, do_expand=expand, do_zero_padding=True)
    rows = recv_x.shape[0] if expand else count
    assert again[3] is handle and torch.equal(again[0][:rows], 2 * recv_x[:rows]) and torch.equal(again[2][:rows], 2 * recv_weights[:rows])
    assert again[0].shape == recv_x.shape and again[2].shape == recv_weights.shape
    end = int(handle.psum_num_recv_tokens_per_expert[-1]) if expand else count
    handle.recv_src_metadata = handle.recv_src_metadata[:count]  # who knows how many there are may leave the rest out
    assert torch.equal(buffer.combine(y[:end], handle)[0], sums)
    if rank == 0:
        with pytest.raises(ty.UsageError, match=rf"x is \[{end - 1}, 256\]; expected {end} rows or more, as the dispatch of this handle gave"):
            buffer.combine(y[:end - 1], handle)
    else:
        with pytest.raises(ty.TransportError, match="expected .* rows or more"):
            buffer.combine(y, handle)
    buffer.barrier()
    buffer.destroy()


@pytest.mark.parametrize("expand, multiple", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("cpu_sync", [True, False])
@pytest.mark.parametrize("alignment", [1, 16])
def test_elastic_buffer(expand, multiple, cpu_sync, alignment, tmp_path):
    on_group(lambda group, rank: check_elastic(group, rank, expand, cpu_sync, alignment, multiple), tmp_path)


def check_elastic_scales(group, rank, expand, cpu_sync, col_major):
    """fp8 rows with scales that lie column by column; both, and weights, are zero where no token is."""
    import deep_ep

    x, ids, weights = given(9)
    scales_of = [torch.stack((torch.arange(t) + 1.0, torch.arange(t) + 100.0 * s)) for s, t in enumerate(TOKENS)]
    buffer = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=7)
    payload = x[rank].to(torch.float8_e4m3fn), scales_of[rank].T
    how = dict(do_expand=expand, do_zero_padding=True, use_tma_aligned_col_major_sf=col_major)
    (rows, scales), _, recv_weights, handle, _ = buffer.dispatch(payload, ids[rank], weights[rank], num_experts=EXPERTS, expert_alignment=4,
                                                                 do_cpu_sync=cpu_sync, **how)
    (rows_again, scales_again), _, _, same, _ = buffer.dispatch(payload, handle=handle, **how)
    assert same is handle and scales.stride() == scales_again.stride() == ((1, (len(rows) + 3) // 4 * 4) if col_major else (2, 1))
    wanted = torch.zeros(len(rows), HIDDEN), torch.zeros(len(rows), 2)
    used = torch.zeros(len(rows), dtype=torch.bool)
    for i, (source, *places) in enumerate(handle.recv_src_metadata[:, [0, *range(2, 2 + TOP_K)]].tolist()):
        for place in [p for p in places if p >= 0] if expand else [i] if source >= 0 else []:
            used[place] = True
            wanted[0][place], wanted[1][place] = x[source // 7][source % 7], scales_of[source // 7][:, source % 7]
    checked = used if not expand else torch.ones_like(used)
    for found_rows, found_scales in (rows, scales), (rows_again, scales_again):
        assert torch.equal(found_rows.float()[checked], wanted[0][checked]) and torch.equal(found_scales[checked], wanted[1][checked])
    assert used.any() and (not expand or (recv_weights[~used] == 0).all())


@pytest.mark.parametrize("expand", [0, 1])
@pytest.mark.parametrize("cpu_sync", [0, 1])
@pytest.mark.parametrize("col_major", [0, 1])
def test_elastic_buffer_with_scales(expand, cpu_sync, col_major, tmp_path):
    on_group(lambda group, rank: check_elastic_scales(group, rank, expand, cpu_sync, col_major), tmp_path)


def test_errors_name_the_value(tmp_path):
    """Rank 1, which is in the call that rank 0 refuses, learns why, and the next call is fine."""
    def main(group, rank):
        import deep_ep

        x, ids = torch.ones(2, 32).bfloat16(), torch.tensor([[0], [1]])
        with pytest.raises(ty.UsageError, match="handle is a int; expected the EPHandle that dispatch returned"):
            deep_ep.ElasticBuffer(group).combine(x, 7)
        with pytest.raises(ty.UsageError, match="2 tokens, num_max_tokens_per_rank = 1"):
            deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=1).dispatch(x, ids, num_experts=2)
        buffer = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=2)
        more, more_ids = (torch.ones(3, 32).bfloat16(), torch.zeros(3, 1).long()) if rank == 0 else (x, ids)
        with pytest.raises(ty.UsageError if rank == 0 else ty.TransportError, match="3 tokens, num_max_tokens_per_rank = 2"):
            buffer.dispatch(more, more_ids, num_experts=2)
        assert buffer.dispatch(x, ids, num_experts=2)[0].shape == x.shape

    on_group(main, tmp_path, 2)
