"""An MoE layer of a published model, forward: ours, and the same built from torch and NCCL's all-to-all, in turns in the same processes.

    PYTHONPATH=build/gpu/python python3 -m torch.distributed.run --nproc-per-node 2 bench/layer_beside_torch.py out.json --preset deepseek-v3 glm-4.5 --tokens 128 4096

theirs: gate in float32, torch's routing, counts exchanged and waited for, rows by all_to_all_single, torch._grouped_mm, the shared expert
while rows travel. "per_expert" sends a row for each (token, expert), as it is commonly written; "per_rank" one for each (token, rank), and
sums where the experts are. "float8" is ours with experts in float8: half the bytes to send and of weights to read. Weights and rows
are random; all must agree with "ours" before anything is timed.
"""
import argparse
import dataclasses
import json
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

import tokenyard as ty
import tokenyard.torch as tyt


def normal(seed, *shape, scale=1.0):
    """bfloat16 on the GPU, a slice of the first dimension at a time."""
    rng = torch.Generator("cuda").manual_seed(seed)
    out = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    for part in out if len(shape) > 1 else [out]:
        part.copy_(torch.randn(part.shape, generator=rng, device="cuda") * scale)
    return out


def draw(preset, rank, ranks):
    """(MoeWeights of this rank: even windows of experts.)"""
    hidden, width, shared = preset.hidden_size, preset.expert_width, preset.shared_expert_width
    local = preset.num_experts // ranks
    made = ty.MoeWeights(gate_weight=normal(1, preset.num_experts, hidden, scale=hidden**-0.5),
                         w13=normal(10 + rank, local, 2, width, hidden, scale=hidden**-0.5), w2=normal(1000 + rank, local, hidden, width, scale=width**-0.5))
    if preset.has_gate_bias:
        made.selection_bias = 0.05 * torch.randn(preset.num_experts, generator=torch.Generator("cuda").manual_seed(2), device="cuda")
    if shared:
        made.shared_w13 = normal(3, 1, 2, shared, hidden, scale=hidden**-0.5)
        made.shared_w2 = normal(4, 1, hidden, shared, scale=shared**-0.5)
    return made


def in_float8(matrices):
    """[L,...,N,K] as float8_e4m3 and a float32 scale for 128 x 128 elements, an expert at a time."""
    *outer, n, k = matrices.shape
    rows = torch.empty(matrices.shape, dtype=torch.float8_e4m3fn, device="cuda")
    scales = torch.empty((*outer, n // 128, k // 128), device="cuda")
    for matrix, row, scale in zip(matrices, rows, scales):
        tiles = matrix.float().unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))  # [...,N/128,128,K/128,128]
        scale.copy_(tiles.abs().amax((-3, -1)) / torch.finfo(torch.float8_e4m3fn).max)
        row.copy_((tiles / scale[..., :, None, :, None]).view(matrix.shape))
    return rows, scales


class TorchLayer:
    """The layer of torch and NCCL."""

    def __init__(self, preset, weights, per_rank):
        self.gate, self.w, self.per_rank, self.ranks = preset.gate, weights, per_rank, dist.get_world_size()
        self.experts, self.local, self.top_k = preset.num_experts, len(weights.w13), preset.top_k
        self.up = weights.w13.flatten(1, 2).transpose(1, 2)  # [L,H,2I]
        self.down = weights.w2.transpose(1, 2)

    def route(self, x):
        logits = torch.mm(x, self.w.gate_weight.T, out_dtype=torch.float32)
        if self.w.selection_bias is None:
            weights, ids = logits.softmax(1).topk(self.top_k, sorted=False)
            return ids, weights / weights.sum(1, keepdim=True)
        scores = logits.sigmoid()
        choice = scores + self.w.selection_bias
        if self.gate.num_groups > 1:
            grouped = choice.view(len(x), self.gate.num_groups, -1)
            kept = grouped.topk(2, dim=2).values.sum(2).topk(self.gate.topk_groups, dim=1, sorted=False).indices
            mask = torch.zeros(len(x), self.gate.num_groups, device="cuda").scatter_(1, kept, 1.0).bool()
            choice = grouped.masked_fill(~mask[:, :, None], float("-inf")).view_as(choice)
        ids = choice.topk(self.top_k, sorted=False).indices
        weights = scores.gather(1, ids)
        return ids, weights / weights.sum(1, keepdim=True) * self.gate.scale

    def shared(self, x):
        if self.w.shared_w13 is None:
            return None
        gate, up = F.linear(x, self.w.shared_w13[0].flatten(0, 1)).chunk(2, 1)
        return F.linear(F.silu(gate) * up, self.w.shared_w2[0])

    def compute(self, rows, local_ids):
        """rows [P,H] of the experts local_ids [P], in that order again."""
        order = local_ids.argsort(stable=True)
        ends = torch.bincount(local_ids, minlength=self.local).cumsum(0).int()
        gate, up = torch._grouped_mm(rows[order], self.up, offs=ends).chunk(2, 1)
        out = torch.empty_like(rows)
        out[order] = torch._grouped_mm(F.silu(gate) * up, self.down, offs=ends)
        return out

    def exchange(self, tensors, send, receive, async_op=False):
        made, works = [], []
        for tensor in tensors:
            out = tensor.new_empty((sum(receive), *tensor.shape[1:]))
            works.append(dist.all_to_all_single(out, tensor, receive, send, async_op=async_op))
            made.append(out)
        return made, works

    def counts(self, destinations):
        send = torch.bincount(destinations, minlength=self.ranks)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send)
        both = torch.stack([send, receive]).tolist()  # waits for the GPU
        return both[0], both[1]

    def __call__(self, x):
        ids, weights = self.route(x)
        return self.by_rank(x, ids, weights) if self.per_rank else self.by_expert(x, ids, weights)

    def by_expert(self, x, ids, weights):
        flat = ids.flatten()
        order = (flat // self.local).argsort(stable=True)
        send, receive = self.counts(flat // self.local)
        tensors = [x[order // self.top_k], flat[order] % self.local]
        (rows, local_ids), works = self.exchange(tensors, send, receive, async_op=True)
        shared = self.shared(x)
        for work in works:
            work.wait()
        (back,), _ = self.exchange([self.compute(rows, local_ids)], receive, send)
        weighted = back.float() * weights.flatten()[order, None]
        return self.total(x, order // self.top_k, weighted, shared)

    def by_rank(self, x, ids, weights):
        wanted = torch.zeros(len(x), self.ranks, dtype=torch.bool, device="cuda").scatter_(1, ids // self.local, True)
        ranks, tokens = wanted.T.nonzero(as_tuple=True)
        send, receive = self.counts(ranks)
        mine = torch.where(ids[tokens] // self.local == ranks[:, None], ids[tokens] % self.local, -1)
        (rows, local_ids, row_weights), works = self.exchange([x[tokens], mine, weights[tokens]], send, receive, async_op=True)
        shared = self.shared(x)
        for work in works:
            work.wait()
        row, k = (local_ids >= 0).nonzero(as_tuple=True)
        y = self.compute(rows[row], local_ids[row, k]).float() * row_weights[row, k, None]
        partial = torch.zeros(rows.shape, device="cuda").index_add_(0, row, y).bfloat16()
        (back,), _ = self.exchange([partial], receive, send)
        return self.total(x, tokens, back.float(), shared)

    @staticmethod
    def total(x, tokens, rows, shared):
        sums = torch.zeros(x.shape, device="cuda").index_add_(0, tokens, rows)
        return (sums if shared is None else sums + shared).bfloat16()


def microseconds(call):
    """From behind a barrier of all GPUs; of the slowest rank."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1, device="cuda"))
    begin.record()
    call()
    end.record()
    end.synchronize()
    us = torch.tensor(begin.elapsed_time(end) * 1e3, device="cuda")
    dist.all_reduce(us, dist.ReduceOp.MAX)
    return us.item()


def captured(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph


def relative_error(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def measure(preset, tokens, args):
    """One setting: a run of the report."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    weights, x = draw(preset, rank, ranks), normal(500 + rank, tokens, preset.hidden_size)
    config = ty.parallel.solve(device_count=ranks, ep=ranks, mlp_tp=1, dp=ranks, tp=1, attn_tp=1, cp=1)
    group = ty.ExpertGroup(tyt.world_from_group(), config, num_experts=preset.num_experts, top_k=preset.top_k, hidden_size=preset.hidden_size,
                           max_tokens_per_rank=tokens, dtype="bfloat16", device="cuda")
    layer, mode, out = ty.MoeLayer(group, weights, preset.gate), ty.mode_for_step(tokens), torch.empty_like(x)
    (w13, w13_scale), (w2, w2_scale) = in_float8(weights.w13), in_float8(weights.w2)
    small = ty.MoeLayer(group, dataclasses.replace(weights, w13=w13, w2=w2, w13_scale=w13_scale, w2_scale=w2_scale), preset.gate)
    calls = {"ours": lambda: layer(x, out, mode=mode), "float8": lambda: small(x, out, mode=mode),
             "per_rank": lambda p=TorchLayer(preset, weights, True): p(x), "per_expert": lambda p=TorchLayer(preset, weights, False): p(x)}
    expected = calls["ours"]().clone()
    errors = {name: relative_error(calls[name](), expected) for name in ("float8", "per_rank", "per_expert")}
    group.check()
    # Four roundings to three bits behind the first, 2.7 % each: of rows, w13, activation and w2.
    assert errors["float8"] < 0.1 and max(errors["per_rank"], errors["per_expert"]) < 2e-2, f"rank {rank}: the layers disagree: {errors}"
    for each, graph in ((layer, "ours"), (small, "float8")):
        each.warm_up([tokens])
        calls[graph + "_graph"] = captured(calls[graph]).replay
    samples = {name: [] for name in calls}
    for i in range(args.warmup + args.iterations):
        for name, call in calls.items():
            us = microseconds(call)
            if i >= args.warmup:
                samples[name].append(us)
    group.check()
    torch.cuda.synchronize()
    dist.barrier()
    medians = {name: sorted(values)[len(values) // 2] for name, values in samples.items()}
    return {"preset": preset.name, "tokens": tokens, "mode": mode, "relative_errors_of_rank_0": errors, "median_us": medians, "samples_us": samples}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["deepseek-v3"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096], help="of each rank")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("json", help="what rank 0 writes")
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    torch.cuda.set_stream(torch.cuda.Stream())
    report = {"benchmark": "layer_beside_torch", "ranks": dist.get_world_size(), "dtype": "bfloat16", "gpu": torch.cuda.get_device_name(),
              "torch": torch.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version())), "iterations": args.iterations, "runs": []}
    for name in args.preset:
        for tokens in args.tokens:
            report["runs"].append(measure(ty.model_preset(name), tokens, args))
            if dist.get_rank() == 0:
                print(json.dumps({key: value for key, value in report["runs"][-1].items() if key != "samples_us"}), flush=True)
                with open(args.json, "w", encoding="utf-8") as file:
                    json.dump(report, file, indent=1)
            torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
