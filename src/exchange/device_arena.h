#pragma once
// What an exchange owns on a GPU for one membership: the arena that peers address, and the words that kernels share with their host.

#include <vector>

#include "kernels/cuda/kernels.h"
#include "memory/device_words.h"
#include "tokenyard/options.h"
#include "tokenyard/world.h"

namespace tokenyard::exchange_internal {

class DeviceArena final : public DeviceWords {
 public:
  // Collective. Throws TransportError.
  DeviceArena(const World& world, const ExchangeOptions& options, const protocol::ArenaShape& shape);

  const cuda::Context& context() const { return context_; }
  std::byte* rows(int buffer) const { return mine(layout().rows + buffer * layout().rows_bytes); }
  std::byte* scales(int buffer) const { return mine(layout().scales + buffer * layout().scales_bytes); }
  std::byte* expert_rows() const { return mine(layout().expert_rows); }
  float* weights_in() const { return reinterpret_cast<float*>(mine(layout().weights_in)); }

  protocol::DeviceState state() const { return read<protocol::DeviceState>(context_.state); }
  std::vector<std::int64_t> link_bytes() const;
  // Starts over from call `last_call`, healthy. Nothing may be under way on any rank.
  void reset(std::uint64_t last_call);

 private:
  std::byte* mine(std::int64_t offset) const { return at(context_.rank, offset); }

  cuda::Context context_;
};

}  // namespace tokenyard::exchange_internal
