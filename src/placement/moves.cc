#include <algorithm>
#include <cstdlib>

#include "core/usage.h"
#include "tokenyard/placement.h"

namespace tokenyard {
namespace {

// A shard of an expert's weights, cut into `of` shards, on a rank.
struct Piece {
  int rank = 0;
  int shard = 0;
  int of = 0;
  auto operator<=>(const Piece&) const = default;
};

// Ascending by rank.
std::vector<Piece> pieces(const Placement& placement, int expert) {
  std::vector<Piece> result;
  for (const Replica& replica : placement.replicas(expert)) {
    const int of = static_cast<int>(replica.shard_ranks.size());
    for (int shard = 0; shard < of; ++shard) result.push_back({replica.shard_ranks[shard], shard, of});
  }
  std::sort(result.begin(), result.end());
  return result;
}

// The holder nearest to the rank that wants it; ties to the lower rank.
const Piece* nearest(const std::vector<Piece>& held, const Piece& wanted) {
  const Piece* best = nullptr;
  for (const Piece& piece : held) {
    if (piece.shard != wanted.shard || piece.of != wanted.of) continue;
    if (best == nullptr || std::abs(piece.rank - wanted.rank) < std::abs(best->rank - wanted.rank)) best = &piece;
  }
  return best;
}

}  // namespace

std::vector<Move> moves(const Placement& from, const Placement& to) {
  if (from.num_experts() != to.num_experts()) {
    usage_error("the placements have {} and {} experts; moves need the same experts in both", from.num_experts(), to.num_experts());
  }
  std::vector<Move> result;
  for (int expert = 0; expert < from.num_experts(); ++expert) {
    const std::vector<Piece> held = pieces(from, expert);
    for (const Piece& wanted : pieces(to, expert)) {
      const Piece* source = nearest(held, wanted);
      if (held.empty()) usage_error("expert {} is on no rank of the old placement; load its weights before placing it", expert);
      if (source == nullptr) {
        usage_error(
            "expert {} is cut into {} shards on rank {}, and the old placement cuts it into {}; keep the number of shards, "
            "or reshard the weights",
            expert, wanted.of, wanted.rank, held.front().of);
      }
      if (source->rank != wanted.rank) result.push_back({expert, wanted.shard, source->rank, wanted.rank});
    }
  }
  return result;
}

}  // namespace tokenyard
