#pragma once
// What collectives own on a GPU: the memory through which lanes of all ranks move rows, the state their kernels keep, and the words in
// pinned memory through which kernels and host tell each other what went wrong.

#include <memory>
#include <string>

#include "core/deadline.h"
#include "kernels/cuda/direct_collective.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "memory/symmetric_memory.h"
#include "protocol/host_words.h"
#include "tokenyard/world.h"

namespace tokenyard::collective_internal {

struct LaneOptions {
  int device = 0;
  int lanes = 1;                // the same on all ranks
  std::int64_t slot_bytes = 0;  // the same on all ranks
  int timeout_ms = 0;
};

class LaneArena {
 public:
  // Collective.
  static Expected<std::unique_ptr<LaneArena>> create(const World& world, const LaneOptions& options);

  const cuda::Context& context() const { return context_; }
  const protocol::LaneLayout& lanes() const { return lanes_; }
  Transport transport() const { return memory_->transport(); }

  protocol::HostWords& words() const { return *pinned_.as<protocol::HostWords>(); }

  // Why `peer` rejected its last call.
  std::string reason_of(int peer) const;
  protocol::DeviceBeacon beacon_of(int peer) const;
  // What `writer` told `owner` about a call.
  protocol::CollectiveHeader header_of(int owner, int writer, std::uint64_t call) const;

 private:
  LaneArena() = default;
  void fill_tables();
  // To the host, without waiting for any other stream.
  template <class T>
  T read(int owner, std::int64_t offset) const {
    T value;
    read(&value, owner, offset, sizeof value);
    return value;
  }
  void read(void* to, int owner, std::int64_t offset, std::size_t bytes) const;

  std::unique_ptr<SymmetricMemory> memory_;
  DeviceBuffer device_;
  PinnedBuffer pinned_;
  std::shared_ptr<CUstream_st> side_;  // of the host's looks at the device
  cuda::Context context_;
  protocol::LaneLayout lanes_;
};

}  // namespace tokenyard::collective_internal
