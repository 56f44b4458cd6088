#pragma once
// What every count and flag message says about the call it belongs to, so that ranks that make different calls learn it
// at once instead of waiting for each other.

#include <cstdint>

#include "protocol/host_device.h"

namespace tokenyard::protocol {

enum class Operation : std::uint8_t { none, dispatch, combine };

// Equal on all ranks for the same call. `call` counts the calls on one exchange from 1.
struct CallHeader {
  std::uint64_t call = 0;
  std::uint64_t placement_hash = 0;
  std::uint64_t handle_call = 0;  // the dispatch whose handle is reused (cached dispatch, combine); 0: none
  std::uint32_t row_bytes = 0;
  std::uint32_t scale_bytes = 0;
  Operation operation = Operation::none;
  std::uint8_t layout = 0;
  std::uint8_t mode = 0;
  std::uint8_t top_k = 0;
  std::uint8_t dtype = 0;        // combine: of y
  std::uint8_t weighting = 0;    // combine
  std::uint8_t unfolded = 0;     // combine: fold = false
  std::uint8_t row_weights = 0;  // combine: weights travel back too
  bool operator==(const CallHeader&) const = default;
};

// 24 bits of a header: one in 2^24 pairs of different calls has the same.
constexpr TY_HOST_DEVICE std::uint32_t digest(const CallHeader& header) {
  const std::uint64_t sizes = static_cast<std::uint64_t>(header.scale_bytes) << 32 | header.row_bytes;
  const std::uint8_t kinds[] = {static_cast<std::uint8_t>(header.operation),
                                header.layout,
                                header.mode,
                                header.top_k,
                                header.dtype,
                                header.weighting,
                                header.unfolded,
                                header.row_weights};
  std::uint64_t packed = 0;
  for (const std::uint8_t kind : kinds) packed = packed << 8 | kind;
  std::uint64_t mixed = 0;
  const std::uint64_t words[] = {header.call, header.placement_hash, header.handle_call, sizes, packed};
  for (const std::uint64_t word : words) {
    mixed = (mixed ^ word) * 0x9e3779b97f4a7c15U;  // 2^64 / golden ratio
    mixed ^= mixed >> 32;
  }
  return static_cast<std::uint32_t>(mixed >> 40);
}

}  // namespace tokenyard::protocol
