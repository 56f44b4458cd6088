#pragma once
// How large the handle of a dispatch on a GPU is, and what lies where in it: arithmetic that needs no GPU.

#include "exchange/layout.h"
#include "kernels/cuda/context.h"
#include "protocol/arena.h"

namespace tokenyard::exchange_internal {

inline protocol::ArenaLayout device_arena_layout(const protocol::ArenaShape& shape) {
  return protocol::arena_layout(shape, {.beacon_bytes = sizeof(protocol::DeviceBeacon),
                                        .mailbox_bytes = sizeof(protocol::DeviceMailbox),
                                        .arrival_bytes = sizeof(std::uint64_t),
                                        .count_bytes = sizeof(std::uint64_t)});
}

// The sizes that a handle's arrays have.
struct HandleShape {
  protocol::ArenaShape arena;
  Layout layout = Layout::token_major;
  Mode mode = Mode::throughput;
  int top_k = 1;
  int local_experts = 0;
  bool gather_map = false;
  std::int64_t rows = 0;         // received rows at most: receive_rows, or ranks * M in latency mode
  std::int64_t output_rows = 0;  // of the layout at most
  std::int64_t map_rows = 0;
  std::int64_t expert_width = 0;  // expert_padded: C

  bool is_expert_layout() const { return layout == Layout::expert_major || layout == Layout::expert_padded; }
  // token_major and rank_slots show received rows as they lie, but for token_major in latency mode, which closes the gaps.
  bool is_compacted() const { return layout == Layout::token_major && mode == Mode::latency; }
};
HandleShape handle_shape(const protocol::ArenaShape& arena, const LayoutOptions& options, Layout layout, Mode mode, int top_k);
// Points the arrays of `view` into the memory at `base`, and returns their bytes; with a null base it only counts.
std::int64_t place_handle(const HandleShape& shape, std::byte* base, cuda::HandleView& view);
std::int64_t handle_bytes(const HandleShape& shape);

}  // namespace tokenyard::exchange_internal
