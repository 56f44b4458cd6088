#pragma once
// What travels with a row: written by the source next to it, read once by the receiver.

#include <cstddef>
#include <cstdint>

#include "protocol/host_device.h"

namespace tokenyard::protocol {

// A view over record bytes of ArenaShape::record_bytes().
struct Record {
  std::byte* bytes = nullptr;
  int top_k = 0;
  TY_HOST_DEVICE std::int32_t& source_token() const { return reinterpret_cast<std::int32_t*>(bytes)[0]; }
  // Where the source wants this row's partial sum: token * partials_per_token + ordinal; -1 for the source's own rank.
  TY_HOST_DEVICE std::int32_t& partial_slot() const { return reinterpret_cast<std::int32_t*>(bytes)[1]; }
  TY_HOST_DEVICE std::int32_t* local_ids() const { return reinterpret_cast<std::int32_t*>(bytes) + 2; }
  TY_HOST_DEVICE float* weights() const { return reinterpret_cast<float*>(bytes) + 2 + top_k; }
};

}  // namespace tokenyard::protocol
