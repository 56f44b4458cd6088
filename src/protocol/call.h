#pragma once
// What every count and flag message says about the call it belongs to, so that ranks that make different calls learn it
// at once instead of waiting for each other.

#include <cstdint>

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

}  // namespace tokenyard::protocol
