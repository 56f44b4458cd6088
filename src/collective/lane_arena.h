#pragma once
// What collectives own on a GPU: the memory through which lanes of all ranks move rows, and the words that kernels share with their host.

#include "kernels/cuda/direct_collective.h"
#include "memory/device_words.h"
#include "tokenyard/world.h"

namespace tokenyard::collective_internal {

struct LaneOptions {
  Transport transport = Transport::cuda_peer;
  void* nccl_communicator = nullptr;
  int device = 0;
  int lanes = 1;                // the same on all ranks
  std::int64_t slot_bytes = 0;  // the same on all ranks
  int timeout_ms = 0;
};

class LaneArena final : public DeviceWords {
 public:
  // Collective. Throws TransportError.
  LaneArena(const World& world, const LaneOptions& options);

  const cuda::Context& context() const { return context_; }
  const protocol::LaneLayout& lanes() const { return lanes_; }
  // What `writer` told `owner` about a call.
  protocol::CollectiveHeader header_of(int owner, int writer, std::uint64_t call) const {
    return read<protocol::CollectiveHeader>(at(owner, lanes_.header(writer, call)));
  }

 private:
  cuda::Context context_;
  protocol::LaneLayout lanes_;
};

}  // namespace tokenyard::collective_internal
