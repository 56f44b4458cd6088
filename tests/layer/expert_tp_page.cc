#include "layer/expert_tp_page.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>

#include "layer/expert_tp_walk.h"

namespace tokenyard::testing {
namespace {

using namespace walk;  // NOLINT(google-build-using-namespace)

// Three decimals, without "-0.000": every machine prints the same.
std::string number(double value) { return fmt::format("{:.3f}", std::abs(value) < 5e-4 ? 0.0 : value); }
std::string vector(const Row& row) { return fmt::format("{}, {}, {}, {}", number(row[0]), number(row[1]), number(row[2]), number(row[3])); }
std::string whole(const Row& row) { return fmt::format("{}, {}, {}, {}", row[0], row[1], row[2], row[3]); }
std::string token(int rank, std::size_t index) { return fmt::format("{}{}", static_cast<char>('a' + rank), index); }
int expert_of(int rank, int local) { return rank / kShards * 2 + local; }

std::string tokens_table(const Seen& seen) {
  std::string text = "| token | of rank | row = logits | experts | weights |\n|---|---|---|---|---|\n";
  for (int rank = 0; rank < kRanks; ++rank) {
    for (std::size_t t = 0; t < kTokens[rank].size(); ++t) {
      text += fmt::format("| {} | {} | {} | {}, {} | {}, {} |\n", token(rank, t), rank, whole(kTokens[rank][t]), seen[rank].ids[t * kTopK],
                          seen[rank].ids[t * kTopK + 1], number(seen[rank].topk_weights[t * kTopK]),
                          number(seen[rank].topk_weights[t * kTopK + 1]));
    }
  }
  return text;
}

std::string placement_table() {
  const Placement placement = Placement::tensor_parallel(kExperts, 2, kShards);
  std::string text = "| expert | shard 0 at (rank, local) | shard 1 at |\n|---|---|---|\n";
  for (int e = 0; e < kExperts; ++e) {
    text += fmt::format("| {}", e);
    for (const Instance& at : placement.instances()) {
      if (at.expert == e) text += fmt::format(" | ({}, {})", at.rank, at.local_index);
    }
    text += " |\n";
  }
  return text;
}

std::string weights_table() {
  std::string text = "| rank | (ep, tp) | rows of w13 | columns of w2 |\n|---|---|---|---|\n";
  for (int rank = 0; rank < kRanks; ++rank) {
    const Shard shard(rank / kShards, rank % kShards);
    text += fmt::format("| {} | ({}, {}) | {} | {} of each expert |\n", rank, rank / kShards, rank % kShards,
                        fmt::join(shard.w13_rows, ", "), rank % kShards);
  }
  return text;
}

std::string rows_table(const Seen& seen, std::vector<ArrivedRow> SeenByRank::*rows) {
  std::string text = "| rank | row | token | local experts | weights |\n|---|---|---|---|---|\n";
  for (int rank = 0; rank < kRanks; ++rank) {
    std::size_t n = 0;
    for (const ArrivedRow& row : seen[rank].*rows) {
      text += fmt::format("| {} | {} | {} | {}, {} | {}, {} |\n", rank, n++, token(row.source, static_cast<std::size_t>(row.token)),
                          row.local_ids[0], row.local_ids[1], number(row.weights[0]), number(row.weights[1]));
    }
  }
  return text;
}

std::string experts_table(const Seen& seen, std::vector<ArrivedRow> SeenByRank::*rows) {
  std::string text = "| rank | token | expert | y: this shard's part | folded: the rank's partial |\n|---|---|---|---|---|\n";
  for (int rank = 0; rank < kRanks; ++rank) {
    for (const ArrivedRow& row : seen[rank].*rows) {
      bool first = true;
      for (std::size_t k = 0; k < kTopK; ++k) {
        if (row.local_ids[k] < 0) continue;
        text += fmt::format("| {} | {} | {} | {} | {} |\n", rank, token(row.source, static_cast<std::size_t>(row.token)),
                            expert_of(rank, row.local_ids[k]), vector(row.y[k]), first ? vector(row.partial) : "");
        first = false;
      }
    }
  }
  return text;
}

std::string sums_table(const Seen& seen) {
  std::string text = "| token | sum |\n|---|---|\n";
  for (int rank = 0; rank < kRanks; ++rank) {
    for (std::size_t t = 0; t < seen[rank].out.size(); ++t) text += fmt::format("| {} | {} |\n", token(rank, t), vector(seen[rank].out[t]));
  }
  return text;
}

std::string reduced_table(const Seen& seen) {
  std::string text = "| rank | token | partial of the window |\n|---|---|---|\n";
  for (int rank = 0; rank < kRanks; ++rank) {
    for (std::size_t n = 0; n < seen[rank].reduced.size(); ++n) {
      const ArrivedRow& row = seen[rank].dispatched[n];
      text +=
          fmt::format("| {} | {} | {} |\n", rank, token(row.source, static_cast<std::size_t>(row.token)), vector(seen[rank].reduced[n]));
    }
  }
  return text;
}

std::string gradient_table(const Seen& seen) {
  std::string text = "| token | expert | shard 0 | shard 1 | sum |\n|---|---|---|---|---|\n";
  for (int rank = 0; rank < kRanks; ++rank) {
    for (std::size_t pair = 0; pair < seen[rank].ids.size(); ++pair) {
      const int expert = seen[rank].ids[pair];
      text += fmt::format("| {} | {}", token(rank, pair / kTopK), expert);
      for (int shard = 0; shard < kShards; ++shard) {
        for (const ArrivedRow& row : seen[expert / 2 * kShards + shard].dispatched) {
          const bool is_it = row.source == rank && row.token == static_cast<int>(pair / kTopK);
          if (is_it) text += " | " + number(row.d_weight[pair % kTopK]);
        }
      }
      text += fmt::format(" | {} |\n", number(seen[rank].d_topk_weights[pair]));
    }
  }
  return text;
}

// In the order of the arguments of expert_tp_page().
constexpr char kText[] = R"(# Expert tensor parallelism, one batch at a time

An expert that is too large for one rank, or too slow on one, is cut over several: each computes a part of its inner size, and the parts
of a row add up. With expert parallelism around it there are two ways to bring rows and shards together, and `MoeLayer` has both.

```cpp
ParallelConfig config = solve_parallel({{.device_count = 4, .ep = 2, .mlp_tp = 2}});
auto group = std::make_shared<ExpertGroup>(world, config, ExpertGroupOptions{{..., .expert_tp = ExpertTp::gathered}});
MoeLayer layer(group, weights, {{.gate = Gate::softmax(2, true)}});
layer.forward(x, out);
```

| | `virtual` | `gathered` |
|---|---|---|
| exchange | one over all ep x tp ranks | one over ep ranks, per shard |
| a row goes to | every shard of its experts, from its source | one rank of its window, which gathers with the others |
| partial sums return | each shard's, to the source | summed over the window first, then to the source |
| crosses between windows | tp rows each way | one row each way |
| collectives | none | all_gather_v before the experts, reduce_scatter_v after |
| sums | all partials at once | of a window, rounded to the rows' type, then of windows |

Both give what one process gives. With `gathered` less crosses between windows, and more within one; `virtual` has fewer steps.
With ep = 1 there is no exchange at all, and both names mean the same: rows are gathered, or, with `same_tokens`, are there already.

The numbers below are computed by the library: `tests/layer/expert_tp_page.cc` writes this page, and a test compares.

## The batch

4 experts of inner size 2, top 2, rows of 4 elements; ep = 2, tp = 2. The ranks have 2, 1, 0 and 1 tokens. The gate is the unit matrix, so
a row is its own logits; weights are the softmax over the chosen two.

{}
## Who holds what

Experts 0 and 1 are the window of ranks 0 and 1, experts 2 and 3 that of ranks 2 and 3. `Placement::tensor_parallel(4, 2, 2)`:

{}
Weights are cut inside each expert and projection (rows of w13 are numbered expert, gate or up, inner element), so that every shard has gate
and up of the same inner elements ([weights.md](weights.md)):

{}
## virtual: dispatch

A token goes to both shards of each window in which it has an expert, once per rank. Local experts are per choice k; -1 is elsewhere.

{}
## virtual: experts, and the fold

Each shard computes all its rows with its half of the inner size. What the two ranks of a window have for a token are parts of one sum. On
each rank the rows of a token are then folded with its weights.

{}
## virtual: combine

The owner of a token adds the partials of all shards of all windows, ranks ascending.

{}
## Backward

The gradient of a row is the sum over its shards, by the same combine. The gradient of a routing weight, here for the loss sum of all
outputs, is a sum of the shards' products:

{}
## gathered: dispatch

The same batch. Ranks 0 and 2 (shard 0 of each window) are one exchange, ranks 1 and 3 another: a token stays with its source's shard.

{}
## gathered: the rows of the window

The ranks of a window gather what they received, in rank order, with local experts and weights. Lengths differ, and may be zero.

{}
## gathered: experts, and the fold

{}
## gathered: the sum over the window

reduce_scatter_v adds the partials of both shards, and returns to each rank the rows that it had received.

{}
Combine then adds, for each token, the windows' partials: the sums above, to the last bit that float32 sums in another order leave.
)";

}  // namespace

std::string expert_tp_page(const Seen& by_virtual, const Seen& by_gathered) {
  constexpr auto kDispatched = &SeenByRank::dispatched;
  return fmt::format(kText, tokens_table(by_virtual), placement_table(), weights_table(), rows_table(by_virtual, kDispatched),
                     experts_table(by_virtual, kDispatched), sums_table(by_virtual), gradient_table(by_virtual),
                     rows_table(by_gathered, kDispatched), rows_table(by_gathered, &SeenByRank::computed),
                     experts_table(by_gathered, &SeenByRank::computed), reduced_table(by_gathered));
}

}  // namespace tokenyard::testing
