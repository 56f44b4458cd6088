"""A decode loop whose step, routing and exchange included, is one CUDA graph: the tokens are those of the same loop without a graph.

Runs on as many GPUs as there are, one process for each.
"""
import time

import torch

import tokenyard as ty

VOCABULARY, HIDDEN, WIDTH, EXPERTS, TOP_K, SEQUENCES, STEPS = 1000, 512, 256, 16, 4, 32, 50


class Model:
    """Embedding, an MoE layer, and the embedding again; every rank has the experts of its placement, all else is on all ranks."""

    def __init__(self, world):
        rng = torch.Generator().manual_seed(0)
        placement = ty.Placement.uniform(EXPERTS, world.size)
        local = placement.local_experts(world.rank)
        make = lambda *shape: torch.randn(*shape, generator=rng) / shape[-2] ** 0.5  # noqa: E731
        self.embedding, self.gate = make(VOCABULARY, HIDDEN).cuda().bfloat16(), make(HIDDEN, EXPERTS).cuda().bfloat16()
        self.up, self.down = (make(EXPERTS, *shape)[local].cuda().bfloat16() for shape in ((HIDDEN, WIDTH), (WIDTH, HIDDEN)))
        self.exchange = ty.Exchange(world, placement, hidden_size=HIDDEN, top_k=TOP_K, max_tokens_per_rank=SEQUENCES, device="cuda", mode="latency")

    def next_tokens(self, tokens):
        x = torch.nn.functional.normalize(self.embedding[tokens].float(), dim=1).bfloat16()
        weights, ids = (x @ self.gate).float().softmax(1).topk(TOP_K)
        given = self.exchange.dispatch(x, ids, weights, layout="expert_padded", zero_padding=True)
        y = self.exchange.combine(torch.bmm(torch.relu(torch.bmm(given.rows, self.up)), self.down), given.handle, weighting="at_expert")
        return ((x + y) @ self.embedding.T).argmax(1)


def decode(step, tokens, first):
    """[STEPS,T] tokens of a loop, and its time per step in microseconds. step() makes tokens the next ones."""
    tokens.copy_(first)
    history = torch.empty(STEPS, len(tokens), dtype=tokens.dtype, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for i in range(STEPS):
        step()
        history[i] = tokens
    torch.cuda.synchronize()
    return history, (time.perf_counter() - begin) / STEPS * 1e6


def rank_main(world):
    torch.cuda.set_device(world.local_rank)
    model, first = Model(world), (torch.arange(SEQUENCES) * 7 + world.rank).cuda()
    tokens = first.clone()

    def step():
        tokens.copy_(model.next_tokens(tokens))

    decode(step, tokens, first)  # once before the capture: libraries choose their kernels
    expected, eager_us = decode(step, tokens, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    world.barrier()
    found, graph_us = decode(graph.replay, tokens, first)
    assert torch.equal(found, expected), "the graph's tokens differ"
    model.exchange.check()
    return len(found.unique()), eager_us, graph_us


if __name__ == "__main__":
    for rank, (different, eager_us, graph_us) in enumerate(ty.run_ranks(rank_main, torch.cuda.device_count())):
        print(f"rank {rank}: {STEPS} steps of {SEQUENCES} sequences, {different} different tokens; {eager_us:.0f} us per step, as a graph {graph_us:.0f} us")
