#pragma once
// The receiver's side of a dispatch: from records in (source rank, token) order to the rows and metadata of a layout.

#include <cstdint>

#include "core/expected.h"
#include "exchange/handle_state.h"
#include "protocol/arena.h"

namespace tokenyard::exchange_internal {

struct LayoutOptions {
  Sizing sizing = Sizing::exact;
  bool gather_map = false;
  int alignment = 1;
  std::int64_t expert_capacity = 0;  // 0: expert_major none, expert_padded receive_rows
  bool drop = false;
  int local_experts = 0;             // of this rank
  std::int64_t max_expert_rows = 0;  // expert_major with capacity
};

// Fills metadata, expert_row and dropped of a handle whose plan and received rows are known. Failure(overflow) when an
// expert layout does not hold the rows (the count matrix has excluded that in throughput mode).
Expected<void> lay_out(HandleState& handle, const LayoutOptions& options, const protocol::ArenaShape& shape);

}  // namespace tokenyard::exchange_internal
