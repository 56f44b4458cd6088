#include "exchange/device_arena.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "core/log.h"
#include "exchange/handle_shape.h"
#include "memory/cuda_handle.h"
#include "memory/cuda_peer.h"

namespace tokenyard::exchange_internal {
namespace {

// In the rank's own device memory.
struct OwnWords {
  protocol::DeviceState state;
  std::uint32_t tickets[cuda::kTickets];
};

}  // namespace

Expected<std::unique_ptr<DeviceArena>> DeviceArena::create(const World& world, const ExchangeOptions& options,
                                                           const protocol::ArenaShape& shape) {
  std::unique_ptr<DeviceArena> arena(new DeviceArena);
  cuda::Context& context = arena->context_;
  context.layout = device_arena_layout(shape);
  context.shape = shape;
  context.rank = world.rank();
  context.ranks = world.size();
  context.timeout_ns = static_cast<std::uint64_t>(options.timeout_ms) * 1'000'000U;

  const auto ranks = static_cast<std::size_t>(world.size());
  const std::size_t own_bytes = sizeof(OwnWords) + ranks * (sizeof(std::byte*) + sizeof(std::uint64_t));
  auto device = make_device_buffer(options.device_index, own_bytes);
  if (!device) return unexpected(device.error());
  arena->device_ = std::move(*device);
  auto pinned = make_pinned_buffer(sizeof(protocol::HostWords));
  if (!pinned) return unexpected(pinned.error());
  arena->pinned_ = std::move(*pinned);
  new (arena->pinned_.data()) protocol::HostWords{};

  auto memory = CudaPeerMemory::create(world, static_cast<std::size_t>(context.layout.total), options.device_index,
                                       Deadline::after_ms(options.timeout_ms));
  if (!memory) return unexpected(memory.error());
  arena->memory_ = std::move(*memory);

  std::byte* const own = arena->device_.data();
  std::byte* const views = own + sizeof(OwnWords);
  context.state = &reinterpret_cast<OwnWords*>(own)->state;
  context.tickets = reinterpret_cast<OwnWords*>(own)->tickets;
  context.arenas = reinterpret_cast<std::byte* const*>(views);
  context.link_bytes = reinterpret_cast<std::uint64_t*>(views + ranks * sizeof(std::byte*));
  context.failure = &arena->words().failure;
  context.abort = &arena->words().abort;
  context.stop = &arena->words().stop;
  std::vector<std::byte*> pointers;
  for (int rank = 0; rank < world.size(); ++rank) pointers.push_back(arena->memory_->view(rank));
  arena->side_ = value_or_throw(borrow_cuda_stream());
  cudaStream_t const side = arena->side_.get();
  cuda_check(cudaMemsetAsync(own, 0, own_bytes, side), "clearing the state of the exchange");
  cuda_check(cudaMemcpyAsync(views, pointers.data(), ranks * sizeof(std::byte*), cudaMemcpyDefault, side), "filling the table of arenas");
  // On a stream of its own: a wait for the whole device would wait for kernels of ranks that wait for this one.
  cuda_check(cudaStreamSynchronize(side), "preparing the exchange");
  log_info("exchange: {} ranks, {} memory on GPU {}, {} bytes per rank", world.size(), name(arena->transport()), options.device_index,
           context.layout.total);
  return arena;
}

void DeviceArena::read(void* to, const void* from, std::size_t bytes) const {
  cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, side_.get()), "reading the state of the exchange");
  cuda_check(cudaStreamSynchronize(side_.get()), "reading the state of the exchange");
}

protocol::DeviceState DeviceArena::state() const { return read<protocol::DeviceState>(context_.state); }

std::vector<std::int64_t> DeviceArena::link_bytes() const {
  std::vector<std::int64_t> bytes(context_.ranks);
  read(bytes.data(), context_.link_bytes, bytes.size() * sizeof(std::int64_t));
  return bytes;
}

protocol::DeviceBeacon DeviceArena::beacon_of(int peer) const { return read<protocol::DeviceBeacon>(at(peer, layout().beacon)); }

std::string DeviceArena::reason_of(int peer) const {
  const std::byte* const box = at(context_.rank, layout().mailboxes + peer * layout().mailbox_bytes);
  char text[protocol::kReasonBytes];
  read(text, box + offsetof(protocol::DeviceMailbox, reason), sizeof text);
  return {text, strnlen(text, sizeof text)};
}

void DeviceArena::reset(std::uint64_t last_call) {
  protocol::DeviceState fresh;
  fresh.call = last_call;
  cuda_check(cudaMemsetAsync(context_.tickets, 0, sizeof(OwnWords::tickets), side_.get()), "resetting the exchange");
  cuda_check(cudaMemcpyAsync(context_.state, &fresh, sizeof fresh, cudaMemcpyDefault, side_.get()), "resetting the exchange");
  for (int peer = 0; peer < context_.ranks; ++peer) {
    std::byte* const box = at(context_.rank, layout().mailboxes + peer * layout().mailbox_bytes);
    cuda_check(cudaMemsetAsync(box + offsetof(protocol::DeviceMailbox, failed), 0, sizeof(std::uint64_t), side_.get()),
               "resetting the exchange");
  }
  cuda_check(cudaStreamSynchronize(side_.get()), "resetting the exchange");
  words().failure = {};
  words().abort = {};
  words().stop.lost_peer = 0;
}

}  // namespace tokenyard::exchange_internal
