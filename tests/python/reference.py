"""What an exchange must do, in plain loops over Python numbers; shares no code with the library.

Inputs are lists over ranks: x[r] [T,H], ids[r] [T,K], weights[r] [T,K]. owners(expert, source, token) lists the (rank, local expert)
that a choice goes to. Values are chosen by data() so that every sum is exact in every dtype: results compare with ==.
"""
import numpy as np


def uniform_owners(num_experts, ranks):
    """Contiguous windows, the first num_experts % ranks ranks own one more."""
    table = []
    for rank in range(ranks):
        size = num_experts // ranks + (rank < num_experts % ranks)
        table += [[(rank, local)] for local in range(size)]
    return lambda expert, source, token: table[expert]


def data(seed, tokens, hidden_size, num_experts, top_k):
    """Small whole rows, weights of quarters, ids with duplicates and some without expert."""
    rng = np.random.default_rng(seed)
    x = [rng.integers(-2, 3, (t, hidden_size)).astype(np.float64) for t in tokens]
    ids = [rng.integers(-1, num_experts, (t, top_k)) for t in tokens]
    weights = [rng.choice([0.25, 0.5, 1.0], (t, top_k)).astype(np.float32) for t in tokens]
    return x, ids, weights


class Reference:
    def __init__(self, x, ids, weights, owners, num_local):
        self.x, self.ids, self.weights, self.owners, self.num_local = x, ids, weights, owners, num_local
        self.ranks, self.top_k = len(x), ids[0].shape[1]

    def local_id(self, rank, source, token, k):
        """The local expert of `rank` that this choice goes to, or -1."""
        expert = self.ids[source][token, k]
        if expert < 0:
            return -1
        return next((local for owner, local in self.owners(expert, source, token) if owner == rank), -1)

    def token_rows(self, rank):
        """(source, token) of every token with an expert here, in order."""
        return [(s, t) for s in range(self.ranks) for t in range(len(self.x[s]))
                if any(self.local_id(rank, s, t, k) >= 0 for k in range(self.top_k))]

    def expert_rows(self, rank, expert):
        """(source, token, k) of every row of a local expert, in order."""
        return [(s, t, k) for s in range(self.ranks) for t in range(len(self.x[s])) for k in range(self.top_k)
                if self.local_id(rank, s, t, k) == expert]

    def counts(self, rank):
        return [len(self.expert_rows(rank, expert)) for expert in range(self.num_local[rank])]

    def token_major(self, rank):
        rows = self.token_rows(rank)
        return {
            "rows": [self.x[s][t] for s, t in rows],
            "local_ids": [[self.local_id(rank, s, t, k) for k in range(self.top_k)] for s, t in rows],
            "row_weights": [self.weights[s][t] for s, t in rows],
            "source_rank": [s for s, t in rows],
            "source_token": [t for s, t in rows],
            "expert_counts": self.counts(rank),
            "rank_counts": [sum(s == source for s, t in rows) for source in range(self.ranks)],
            "sent_counts": [sum(s == rank for s, t in self.token_rows(to)) for to in range(self.ranks)],
        }

    def gather_map(self, rank):
        index = {row: i for i, row in enumerate(self.token_rows(rank))}
        groups = [[index[s, t] for s, t, k in self.expert_rows(rank, expert)] for expert in range(self.num_local[rank])]
        return {"expert_rows": [i for group in groups for i in group],
                "expert_offsets": np.concatenate([[0], np.cumsum([len(group) for group in groups])])}

    def expert_major(self, rank, alignment=1):
        """rows etc. with None for padding."""
        slots, offsets = [], [0]
        for expert in range(self.num_local[rank]):
            slots += self.expert_rows(rank, expert)
            slots += [None] * (-len(slots) % alignment)
            offsets.append(len(slots))
        return {"slots": slots, "expert_offsets": offsets, "expert_counts": self.counts(rank)}

    def combine(self, expert_of, weights=None):
        """[r]: the sums of every rank; expert_of(rank, local, row) is what the expert makes of a row; weights None: unweighted."""
        sums = [np.zeros_like(x) for x in self.x]
        for source in range(self.ranks):
            for token in range(len(self.x[source])):
                for k in range(self.top_k):
                    if self.ids[source][token, k] < 0:
                        continue
                    factor = 1.0 if weights is None else float(weights[source][token, k])
                    for rank, local in self.owners(self.ids[source][token, k], source, token):
                        sums[source][token] += factor * expert_of(rank, local, self.x[source][token])
        return sums
