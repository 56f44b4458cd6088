#pragma once
// What lies where in the arena of a rank. Pure arithmetic over the maximum shape, the same on all ranks, so that a peer's
// address is its base plus an offset known here.

#include <cstdint>

#include "protocol/host_device.h"

namespace tokenyard::protocol {

constexpr TY_HOST_DEVICE std::int64_t align_up(std::int64_t value, std::int64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

struct ArenaShape {
  std::int64_t ranks = 1;
  std::int64_t max_tokens_per_rank = 0;
  std::int64_t row_bytes = 0;
  std::int64_t scale_bytes = 0;
  std::int64_t top_k = 1;
  std::int64_t max_local_experts = 1;
  std::int64_t max_fanout = 1;
  std::int64_t receive_rows = 0;
  std::int64_t depth = 1;
  bool expert_rows = false;
  bool unfolded = false;

  // {source token, partial slot} int32, local ids [K] int32, weights [K] float32.
  constexpr TY_HOST_DEVICE std::int64_t record_bytes() const { return align_up(8 + 8 * top_k, 16); }
  // Partial sums that other ranks may return for one token.
  constexpr TY_HOST_DEVICE std::int64_t partials_per_token() const {
    const std::int64_t contributions = top_k * max_fanout;
    return contributions < ranks - 1 ? contributions : ranks - 1;
  }
  constexpr TY_HOST_DEVICE std::int64_t staging_rows() const {
    const std::int64_t per_token = unfolded ? top_k * max_fanout : partials_per_token();
    return max_tokens_per_rank * per_token;
  }
  // Per source: rows for each rank, then rows for each (rank, local expert).
  constexpr TY_HOST_DEVICE std::int64_t count_words() const { return ranks * (1 + max_local_experts); }
  constexpr TY_HOST_DEVICE std::int64_t instance_word(std::int64_t rank, std::int64_t local) const {
    return ranks + rank * max_local_experts + local;
  }
};

// Offsets in bytes; every region starts on a cache line.
struct ArenaLayout {
  std::int64_t doorbell = 0, beacon = 0;
  std::int64_t mailboxes = 0, mailbox_bytes = 0;          // [R]
  std::int64_t counts = 0, counts_bytes = 0;              // [2][R] tables, by call parity
  std::int64_t arrivals = 0, arrivals_bytes = 0;          // [R][M] flag words: a token of a source is here (GPUs, latency mode)
  std::int64_t records = 0, records_bytes = 0;            // [depth] buffers
  std::int64_t scales = 0, scales_bytes = 0;              // [depth] buffers
  std::int64_t rows = 0, rows_bytes = 0;                  // [depth] buffers
  std::int64_t staging = 0, staging_bytes = 0;            // partial sums on their way back
  std::int64_t weights_in = 0, weights_in_bytes = 0;      // [receive_rows][K]: the source's weights at combine
  std::int64_t weights_back = 0, weights_back_bytes = 0;  // [staging slots][K]: row weights on their way back
  std::int64_t expert_rows = 0, expert_rows_bytes = 0;
  std::int64_t total = 0;
};

constexpr std::int64_t kCacheLine = 64;

// Sizes of the flag structures, which depend on the machine that waits for them.
struct FlagSizes {
  std::int64_t doorbell_bytes = 0;
  std::int64_t beacon_bytes = 0;
  std::int64_t mailbox_bytes = 0;
  std::int64_t arrival_bytes = 0;  // per token of each rank
  std::int64_t count_bytes = 4;    // of a count: int32, or a word that says of which call it is
};

// The caller has checked that no product overflows (exchange/memory_plan.cc).
constexpr ArenaLayout arena_layout(const ArenaShape& shape, const FlagSizes& flags) {
  ArenaLayout layout;
  std::int64_t end = 0;
  auto place = [&end](std::int64_t bytes) {
    const std::int64_t begin = end;
    end = align_up(end + bytes, kCacheLine);
    return begin;
  };
  layout.mailbox_bytes = flags.mailbox_bytes;
  layout.counts_bytes = align_up(shape.count_words() * flags.count_bytes, kCacheLine);
  layout.arrivals_bytes = shape.ranks * shape.max_tokens_per_rank * flags.arrival_bytes;
  layout.records_bytes = align_up(shape.receive_rows * shape.record_bytes(), kCacheLine);
  layout.scales_bytes = align_up(shape.receive_rows * shape.scale_bytes, kCacheLine);
  layout.rows_bytes = align_up(shape.receive_rows * shape.row_bytes, 4096);
  layout.staging_bytes = shape.staging_rows() * shape.row_bytes;
  layout.weights_in_bytes = shape.receive_rows * shape.top_k * 4;
  layout.weights_back_bytes = shape.max_tokens_per_rank * shape.partials_per_token() * shape.top_k * 4;
  layout.expert_rows_bytes = shape.expert_rows ? shape.receive_rows * shape.row_bytes : 0;

  layout.doorbell = place(flags.doorbell_bytes);
  layout.beacon = place(flags.beacon_bytes);
  layout.mailboxes = place(shape.ranks * flags.mailbox_bytes);
  layout.counts = place(2 * shape.ranks * layout.counts_bytes);
  layout.arrivals = place(layout.arrivals_bytes);
  layout.records = place(shape.depth * layout.records_bytes);
  layout.scales = place(shape.depth * layout.scales_bytes);
  layout.weights_in = place(layout.weights_in_bytes);
  layout.weights_back = place(layout.weights_back_bytes);
  end = align_up(end, 4096);
  layout.rows = place(shape.depth * layout.rows_bytes);
  layout.staging = place(layout.staging_bytes);
  layout.expert_rows = place(layout.expert_rows_bytes);
  layout.total = end;
  return layout;
}

}  // namespace tokenyard::protocol
