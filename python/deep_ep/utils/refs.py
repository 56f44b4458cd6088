"""What dispatch and combine must give, by gathering everything from everybody. Collective over all ranks, and slow."""
import math

import torch
import torch.distributed as dist

from .envs import get_global_seed


def dispatch(x, topk_idx, topk_weights, num_max_tokens_per_rank, num_experts):
    """(recv_x, recv_topk_idx, recv_topk_weights, source token indices int32, rows from each rank int32): rows by (source rank, token);
    recv_topk_idx local, -1 elsewhere; weights as sent."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    window = num_experts // ranks
    parts = x if isinstance(x, tuple) else (x,)
    told = [None] * ranks
    dist.all_gather_object(told, [t.cpu() for t in (*(p.contiguous().view(torch.uint8) for p in parts), topk_idx, topk_weights)])
    kept, counts = [], []
    for source, (*rows, ids, weights) in enumerate(told):
        local = torch.where((ids >= rank * window) & (ids < (rank + 1) * window), ids - rank * window, -1)
        here = (local >= 0).any(1).nonzero()[:, 0]
        kept.append([*(row[here] for row in rows), local[here], weights[here], (here + source * num_max_tokens_per_rank).int()])
        counts.append(len(here))
    *rows, ids, weights, source = (torch.cat(column).to(topk_idx.device) for column in zip(*kept))
    rows = [row.view(part.dtype) for row, part in zip(rows, parts)]
    return tuple(rows) if isinstance(x, tuple) else rows[0], ids, weights, source, torch.tensor(counts, dtype=torch.int)


def generate_pre_combine_data(src_token_global_idx, num_max_tokens_per_rank, num_topk, hidden):
    """[n,K,H] bfloat16 that every rank can make for any token: a sine of the token's number, the choice and the column."""
    largest = dist.get_world_size() * num_max_tokens_per_rank * num_topk
    seeds = src_token_global_idx[:, None].long() * num_topk + torch.arange(num_topk, device=src_token_global_idx.device)
    pitch = ((seeds * 131071 % largest).float() + 1) / largest
    columns = torch.arange(1, hidden + 1, dtype=torch.float32, device=pitch.device)
    return torch.sin(pitch[:, :, None] * columns + math.sin(float(get_global_seed()))).to(torch.bfloat16)


def ordered_accumulate(data, initial_value=None):
    """[n,H]: the float32 sum over K of data [n,K,H], in order, behind initial_value; rounded to data's dtype."""
    total = torch.zeros(data.shape[0], data.shape[2], dtype=torch.float32, device=data.device) if initial_value is None else initial_value.float().clone()
    for k in range(data.shape[1]):
        total += data[:, k].float()
    return total.to(data.dtype)


def _sum_within(y, group):
    """Sums of the rows of one group [n,K], in order, rounded, at the group's last place; zeros elsewhere."""
    result = torch.zeros_like(y)
    for k in range(y.shape[1]):
        last = (group[:, k + 1:] != group[:, k:k + 1]).all(1)
        members = torch.where((group == group[:, k:k + 1])[:, :, None], y.float(), 0)
        total = torch.zeros(y.shape[0], y.shape[2], dtype=torch.float32, device=y.device)
        for j in range(k + 1):
            total += members[:, j]
        result[last, k] = total[last].to(y.dtype)
    return result


def combine(y, topk_idx, num_scaleout_ranks, num_scaleup_ranks, num_experts, bias, reduce_in_local, reduce_in_scaleup):
    """[n,H] of y [n,K,H]: biases, then the choices in order, with sums within a rank, and within a scale-up domain, rounded first."""
    window = num_experts // (num_scaleout_ranks * num_scaleup_ranks)
    if reduce_in_local:
        y = _sum_within(y, topk_idx // window)
    if reduce_in_scaleup:
        y = _sum_within(y, topk_idx // (window * num_scaleup_ranks))
    biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
    return ordered_accumulate(y, sum(b.float() for b in biases) if biases else None)
