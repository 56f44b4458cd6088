#pragma once
// The source's side of a dispatch: which ranks each token goes to, and how many rows that makes everywhere.

#include <cstdint>
#include <span>
#include <vector>

#include "placement/table.h"
#include "protocol/arena.h"
#include "tokenyard/tensor_view.h"

namespace tokenyard::exchange_internal {

// One row to send. Entries of a token are ascending in rank.
struct SendEntry {
  std::int32_t rank = 0;
  std::int32_t slot = 0;           // index of its record at the destination: absolute, or counted per source in latency mode
  std::int32_t partial_slot = -1;  // where its partial sum comes back; -1 on this rank itself
  std::uint64_t k_mask = 0;        // the top-k positions it serves
};

struct SendPlan {
  std::int64_t num_tokens = 0;
  int top_k = 0;
  std::vector<std::int64_t> token_begin;  // [T+1] into entries
  std::vector<SendEntry> entries;
  std::vector<std::int32_t> local_ids;  // [entries, K], -1 where the rank does not serve k
  std::vector<std::int32_t> counts;     // ArenaShape::count_words(), this rank's row of the count matrix
  std::int64_t invalid_ids = 0;         // ids >= E, treated as no expert
  std::int64_t lost_ids = 0;            // ids of experts without an instance

  std::span<const SendEntry> entries_of(std::int64_t token) const {
    return {entries.data() + token_begin[token], static_cast<std::size_t>(token_begin[token + 1] - token_begin[token])};
  }
};

struct PlanInput {
  ConstTensorView topk_ids;  // [T,K] or [T], int64 or int32, any strides
  int top_k = 1;
  int rank = 0;
  std::int64_t token_base = 0;
};

// The ids, or weights, of a token, whatever the dtype and strides. out: [K]
void read_ids(const ConstTensorView& ids, std::int64_t token, std::span<std::int64_t> out);
void read_weights(const ConstTensorView& weights, std::int64_t token, std::span<float> out);

SendPlan make_send_plan(const PlanInput& input, const placement_internal::TableView& table, const protocol::ArenaShape& shape);

// Turns the per-source ordinals in `slot` into absolute slots: base[d] is where this rank's rows start at rank d.
void offset_slots(SendPlan& plan, std::span<const std::int64_t> base);

}  // namespace tokenyard::exchange_internal
