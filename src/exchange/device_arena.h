#pragma once
// What an exchange owns on a GPU for one membership: the arena that peers address, the state its kernels keep, and the words in
// pinned memory through which kernels and host tell each other what went wrong.

#include <memory>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "memory/symmetric_memory.h"
#include "protocol/host_words.h"
#include "tokenyard/options.h"
#include "tokenyard/world.h"

namespace tokenyard::exchange_internal {

class DeviceArena {
 public:
  // Collective.
  static Expected<std::unique_ptr<DeviceArena>> create(const World& world, const ExchangeOptions& options,
                                                       const protocol::ArenaShape& shape);

  const cuda::Context& context() const { return context_; }
  const protocol::ArenaLayout& layout() const { return context_.layout; }
  std::byte* at(int rank, std::int64_t offset) const { return memory_->view(rank) + offset; }
  std::byte* rows(int buffer) const { return at(context_.rank, layout().rows + buffer * layout().rows_bytes); }
  std::byte* scales(int buffer) const { return at(context_.rank, layout().scales + buffer * layout().scales_bytes); }
  std::byte* expert_rows() const { return at(context_.rank, layout().expert_rows); }
  float* weights_in() const { return reinterpret_cast<float*>(at(context_.rank, layout().weights_in)); }
  Transport transport() const { return memory_->transport(); }

  protocol::HostWords& words() const { return *pinned_.as<protocol::HostWords>(); }

  protocol::DeviceState state() const;
  std::vector<std::int64_t> link_bytes() const;
  protocol::DeviceBeacon beacon_of(int peer) const;
  // Why `peer` rejected its last call.
  std::string reason_of(int peer) const;
  // Starts over from call `last_call`, healthy. Nothing may be under way on any rank.
  void reset(std::uint64_t last_call);

 private:
  DeviceArena() = default;
  // To the host, without waiting for any other stream.
  void read(void* to, const void* from, std::size_t bytes) const;
  template <class T>
  T read(const void* from) const {
    T value;
    read(&value, from, sizeof value);
    return value;
  }

  std::unique_ptr<SymmetricMemory> memory_;
  DeviceBuffer device_;
  PinnedBuffer pinned_;
  std::shared_ptr<CUstream_st> side_;  // of the host's looks at the device
  cuda::Context context_;
};

}  // namespace tokenyard::exchange_internal
