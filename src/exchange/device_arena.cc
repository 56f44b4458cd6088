#include "exchange/device_arena.h"

#include <cstddef>

#include "core/log.h"
#include "exchange/handle_shape.h"

namespace tokenyard::exchange_internal {

DeviceArena::DeviceArena(const World& world, const ExchangeOptions& options, const protocol::ArenaShape& shape)
    : DeviceWords(world, device_arena_layout(shape),
                  {.transport = options.transport,
                   .nccl_communicator = options.nccl_communicator,
                   .device = options.device_index,
                   .arena_bytes = device_arena_layout(shape).total,
                   .own_bytes = world.size() * static_cast<std::int64_t>(sizeof(std::uint64_t)),
                   .timeout_ms = options.timeout_ms}),
      context_{view(), shape, reinterpret_cast<std::uint64_t*>(own())} {
  log_info("exchange: {} ranks, {} memory on GPU {}, {} bytes per rank", world.size(), name(transport()), options.device_index,
           layout().total);
}

std::vector<std::int64_t> DeviceArena::link_bytes() const {
  std::vector<std::int64_t> bytes(context_.ranks);
  read(bytes.data(), context_.link_bytes, bytes.size() * sizeof(std::int64_t));
  return bytes;
}

void DeviceArena::reset(std::uint64_t last_call) {
  const auto done = [](cudaError_t error) { cuda_check(error, "resetting the exchange"); };
  protocol::DeviceState fresh;
  fresh.call = last_call;
  done(cudaMemsetAsync(context_.tickets, 0, sizeof(protocol::OwnWords::tickets), side()));
  done(cudaMemcpyAsync(context_.state, &fresh, sizeof fresh, cudaMemcpyDefault, side()));
  for (int peer = 0; peer < context_.ranks; ++peer) {
    std::byte* const box = mine(layout().mailboxes + peer * layout().mailbox_bytes);
    done(cudaMemsetAsync(box + offsetof(protocol::DeviceMailbox, failed), 0, sizeof(std::uint64_t), side()));
  }
  done(cudaStreamSynchronize(side()));
  host().failure = {};
  host().abort = {};
  host().stop.lost_peer = 0;
}

}  // namespace tokenyard::exchange_internal
