#pragma once
// The arithmetic of a combine that needs no GPU: which partial sums a token has, in which order they are added, in which
// slots they arrive, and how rows are cut into pieces for warps. Tested on the CPU.

#include <cstdint>

#include "protocol/arena.h"
#include "protocol/host_device.h"
#include "tokenyard/options.h"

namespace tokenyard::cuda {

// Whether the highest bit of a lies below that of b.
constexpr TY_HOST_DEVICE bool ends_before(std::uint64_t a, std::uint64_t b) { return a < b && a < (a ^ b); }

// Where one token went, as the handle keeps it.
struct TokenRoute {
  const std::int32_t* slots = nullptr;     // [ranks], -1: not there
  const std::uint64_t* k_masks = nullptr;  // [ranks]: the top-k positions served there
  const std::int32_t* groups = nullptr;    // [ranks]; null: flat
  int ranks = 1;
  Order order = Order::rank_ascending;

  constexpr TY_HOST_DEVICE bool is_served(int rank) const { return slots[rank] >= 0; }
  constexpr TY_HOST_DEVICE int group_of(int rank) const { return groups != nullptr ? groups[rank] : 0; }
  // Whether a's partial sum is added before b's: by group, then (topk) by the last top-k position, then by rank.
  constexpr TY_HOST_DEVICE bool precedes(int a, int b) const {
    if (group_of(a) != group_of(b)) return group_of(a) < group_of(b);
    if (order == Order::topk) {
      if (ends_before(k_masks[a], k_masks[b])) return true;
      if (ends_before(k_masks[b], k_masks[a])) return false;
    }
    return a < b;
  }
  // How many partial sums are added before that of `rank`.
  constexpr TY_HOST_DEVICE int place_of(int rank) const {
    int place = 0;
    for (int other = 0; other < ranks; ++other) place += other != rank && is_served(other) && precedes(other, rank) ? 1 : 0;
    return place;
  }
  // The ordinal of `rank` among the ranks that serve k: which of the unfolded slots of (token, k) it fills.
  constexpr TY_HOST_DEVICE int shard_of(int rank, int k) const {
    int ordinal = 0;
    for (int other = 0; other < rank; ++other) ordinal += is_served(other) && (k_masks[other] >> k & 1) != 0 ? 1 : 0;
    return ordinal;
  }
};

// Staging slots: of the ordinal-th other rank that serves a token; of the ordinal-th rank that serves (token, k).
constexpr TY_HOST_DEVICE std::int64_t folded_slot(const protocol::ArenaShape& shape, std::int64_t token, int ordinal) {
  return token * shape.partials_per_token() + ordinal;
}
constexpr TY_HOST_DEVICE std::int64_t unfolded_slot(const protocol::ArenaShape& shape, std::int64_t token, int k, int ordinal) {
  return (token * shape.top_k + k) * shape.max_fanout + ordinal;
}

// How rows of `vectors` 16-byte vectors are cut, so that `warps` warps have about the same to do: many rows stay whole, few
// are cut down to two vectors per lane. A row without vectors is one empty segment.
struct RowCut {
  int segments = 1;
  int length = 0;                   // vectors of a segment, a multiple of kStep; the last one may be shorter
  static constexpr int kStep = 32;  // what a warp takes at once

  static constexpr TY_HOST_DEVICE RowCut of(std::int64_t rows, std::int64_t warps, int vectors) {
    constexpr std::int64_t kUnitsPerWarp = 4;
    constexpr int kLeast = 2;
    const int steps = (vectors + kStep - 1) / kStep;
    if (steps == 0) return {};
    const std::int64_t wanted = rows > 0 ? (kUnitsPerWarp * warps + rows - 1) / rows : 1;
    const int most = (steps + kLeast - 1) / kLeast;
    const int segments = wanted < most ? static_cast<int>(wanted) : most;
    const int steps_each = (steps + segments - 1) / segments;
    return {.segments = (steps + steps_each - 1) / steps_each, .length = steps_each * kStep};
  }
};

// The n-th piece of what a rank returns to others: sources take turns row by row, so that all links are busy, and every
// rank begins behind itself, so that no owner is written by all at once.
struct AwayPiece {
  int source = 0;
  std::int64_t row = 0;  // counted from the first one of the source
  int segment = 0;

  static constexpr TY_HOST_DEVICE AwayPiece of(std::int64_t n, int segments, int rank, int ranks) {
    const std::int64_t pair = n / segments;
    const std::int64_t row = pair / (ranks - 1);
    const int step = static_cast<int>(pair - row * (ranks - 1));
    const int source = rank + 1 + step;
    return {.source = source < ranks ? source : source - ranks, .row = row, .segment = static_cast<int>(n - pair * segments)};
  }
};

}  // namespace tokenyard::cuda
