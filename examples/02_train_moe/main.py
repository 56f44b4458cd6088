"""A small MoE language model, trained on this checkout's documents by 4 ranks and by one: the losses are the same.

Every rank has its share of the tokens (not the same number each) and of the experts; what all ranks hold is summed over them.
"""
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, embedding, silu

import tokenyard as ty
from tokenyard.torch import MoEDispatcher

HIDDEN, WIDTH, EXPERTS, TOP_K, CONTEXT, BATCH, STEPS, RATE = 32, 64, 8, 2, 4, 96, 60, 0.3


def text():
    root = Path(__file__).parents[2]
    documents = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in documents)), dtype=torch.uint8).long()


def parameter(name, *shape):
    """The same numbers on every rank, whatever else it makes."""
    rng = torch.Generator().manual_seed(sum(map(ord, name)))
    return (torch.randn(*shape, generator=rng) * (1 if name == "embedding" else shape[0] ** -0.5)).requires_grad_()


class Model:
    def __init__(self, world):
        self.world = world
        placement = ty.Placement.uniform(EXPERTS, world.size)
        self.dispatcher = MoEDispatcher(world, placement, hidden_size=HIDDEN, top_k=TOP_K, max_tokens_per_rank=BATCH, dtype="float32")
        self.sums = ty.Collectives(world)
        self.shared = {"embedding": parameter("embedding", 256, HIDDEN), "mix": parameter("mix", CONTEXT * HIDDEN, HIDDEN),
                       "gate": parameter("gate", HIDDEN, EXPERTS), "head": parameter("head", HIDDEN, 256)}
        self.experts = [(parameter(f"up {e}", HIDDEN, WIDTH), parameter(f"down {e}", WIDTH, HIDDEN)) for e in placement.local_experts(world.rank)]

    def compute(self, rows, tokens_per_expert):
        parts = zip(rows.split(tokens_per_expert), self.experts)
        return torch.cat([silu(part @ up) @ down for part, (up, down) in parts])

    def logits(self, contexts):
        x = silu(embedding(contexts, self.shared["embedding"]).flatten(1) @ self.shared["mix"])
        scores, topk_ids = (x @ self.shared["gate"]).topk(TOP_K)
        return (x + self.dispatcher(x, topk_ids, scores.softmax(-1), self.compute)) @ self.shared["head"]

    def over_ranks(self, tensor):
        return self.sums.all_gather_v(tensor.flatten()[None], [1] * self.world.size).sum(0).view(tensor.shape)

    def step(self, contexts, targets):
        """One step on the whole batch, of which this rank computes its part; the mean loss of the batch."""
        loss = cross_entropy(self.logits(contexts), targets, reduction="sum") / BATCH
        local = [weight for pair in self.experts for weight in pair]
        everywhere = list(self.shared.values())
        gradients = torch.autograd.grad(loss, everywhere + local)
        with torch.no_grad():
            for weight, gradient in zip(everywhere, gradients):
                weight -= RATE * self.over_ranks(gradient)
            for weight, gradient in zip(local, gradients[len(everywhere):]):
                weight -= RATE * gradient
        return float(self.over_ranks(loss.detach()[None]))


def train(world, tokens):
    model, rng = Model(world), torch.Generator().manual_seed(1)
    cuts = [BATCH * rank * (rank + 1) // (world.size * (world.size + 1)) for rank in range(world.size + 1)]  # rank r has r + 1 shares
    losses = []
    for _ in range(STEPS):
        begins = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=rng)[cuts[world.rank]:cuts[world.rank + 1]]
        losses.append(model.step(torch.stack([tokens[b:b + CONTEXT] for b in begins]), torch.stack([tokens[b + CONTEXT] for b in begins])))
    return losses


if __name__ == "__main__":
    tokens = text()
    alone, together = train(ty.World.in_process(1)[0], tokens), ty.run_ranks(train, 4, tokens)
    for step in range(0, STEPS, 15):
        print(f"step {step:2}: loss {alone[step]:.5f} on one rank, {together[0][step]:.5f} on four")
    assert all(losses == together[0] for losses in together), "ranks disagree"
    torch.testing.assert_close(together[0], alone, rtol=1e-4, atol=1e-4)
    assert alone[-1] < alone[0] - 1, "nothing was learnt"
