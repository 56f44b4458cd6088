"""A dense MoE in one process, and many ranks as one differentiable function."""
import torch

import tokenyard as ty


def experts_of(num_experts, hidden_size, seed=0, dtype=torch.float64):
    """[E,H,H] matrices; expert e computes tanh(x) @ W[e]."""
    return torch.randn(num_experts, hidden_size, hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def compute(rows, matrix):
    return torch.tanh(rows) @ matrix


def dense(x, ids, weights, matrices):
    """[T,H]: sum over k of w[t,k] f_e(x[t]), token by token."""
    rows = []
    for token in range(x.shape[0]):
        total = 0 * x[token]  # part of the graph, whatever follows
        for k, expert in enumerate(ids[token].tolist()):
            if expert >= 0:
                total = total + weights[token, k].to(x.dtype) * compute(x[token], matrices[expert])
        rows.append(total)
    return torch.stack(rows) if rows else x * 0


class Ranks:
    """fn(rank, world, *inputs of the rank) on rank threads, as one function of the inputs of all ranks.

    Calling it runs all ranks' forward passes together, and backward all backward passes: gradcheck sees one function.
    """

    def __init__(self, ranks, fn, setup):
        self.worlds = ty.World.in_process(ranks, timeout_ms=30_000)
        self.fn = fn
        self.states = self.together(lambda rank: setup(self.worlds[rank]))

    def together(self, task):
        """[task(rank)] on rank threads; the first error is raised."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(len(self.worlds)) as pool:
            return [future.result() for future in [pool.submit(task, rank) for rank in range(len(self.worlds))]]

    def __call__(self, *inputs):
        """inputs: for every rank as many as fn takes, rank by rank; the outputs rank by rank."""
        return _Together.apply(self, *inputs)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks, *inputs):
        each = len(inputs) // len(ranks.worlds)
        ctx.ranks, ctx.each = ranks, each
        ctx.leaves = [[t.detach().requires_grad_(t.requires_grad) for t in inputs[r * each:(r + 1) * each]] for r in range(len(ranks.worlds))]

        def task(rank):
            with torch.enable_grad():
                return ranks.fn(ranks.states[rank], rank, *ctx.leaves[rank])

        ctx.outputs = ranks.together(task)
        return tuple(out.detach() for out in ctx.outputs)

    @staticmethod
    def backward(ctx, *grads):
        def task(rank):
            wanted = [leaf for leaf in ctx.leaves[rank] if leaf.requires_grad]
            found = iter(torch.autograd.grad(ctx.outputs[rank], wanted, grads[rank], retain_graph=True, allow_unused=True))
            return [next(found) if leaf.requires_grad else None for leaf in ctx.leaves[rank]]

        return None, *(grad for rank_grads in ctx.ranks.together(task) for grad in rank_grads)
