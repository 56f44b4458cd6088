#include "collective/lane_arena.h"

#include <cstddef>
#include <cstring>
#include <vector>

#include "memory/cuda_peer.h"

namespace tokenyard::collective_internal {
namespace {

// In the rank's own device memory; behind it the table of arenas.
struct OwnWords {
  protocol::DeviceState state;
  std::uint32_t tickets[cuda::kTickets];
};

}  // namespace

Expected<std::unique_ptr<LaneArena>> LaneArena::create(const World& world, const LaneOptions& options) {
  std::unique_ptr<LaneArena> arena(new LaneArena);
  cuda::Context& context = arena->context_;
  // The flags of an exchange without rows; the lanes lie behind them.
  context.shape = {.ranks = world.size()};
  context.layout = protocol::arena_layout(
      context.shape, {.beacon_bytes = sizeof(protocol::DeviceBeacon), .mailbox_bytes = sizeof(protocol::DeviceMailbox)});
  context.rank = world.rank();
  context.ranks = world.size();
  context.timeout_ns = static_cast<std::uint64_t>(options.timeout_ms) * 1'000'000U;
  arena->lanes_ = protocol::LaneLayout::of(world.size(), options.lanes, options.slot_bytes, context.layout.total);

  auto device = make_device_buffer(options.device, sizeof(OwnWords) + world.size() * sizeof(std::byte*));
  if (!device) return unexpected(device.error());
  arena->device_ = std::move(*device);
  auto pinned = make_pinned_buffer(sizeof(protocol::HostWords));
  if (!pinned) return unexpected(pinned.error());
  arena->pinned_ = std::move(*pinned);
  new (arena->pinned_.data()) protocol::HostWords{};
  auto side = borrow_cuda_stream();
  if (!side) return unexpected(side.error());
  arena->side_ = std::move(*side);

  auto memory =
      CudaPeerMemory::create(world, static_cast<std::size_t>(arena->lanes_.total), options.device, Deadline::after_ms(options.timeout_ms));
  if (!memory) return unexpected(memory.error());
  arena->memory_ = std::move(*memory);
  arena->fill_tables();
  return arena;
}

void LaneArena::fill_tables() {
  auto* const own = device_.as<OwnWords>();
  std::byte* const views = device_.data() + sizeof(OwnWords);
  context_.state = &own->state;
  context_.tickets = own->tickets;
  context_.arenas = reinterpret_cast<std::byte* const*>(views);
  context_.failure = &words().failure;
  context_.abort = &words().abort;
  context_.stop = &words().stop;
  std::vector<std::byte*> pointers;
  for (int rank = 0; rank < context_.ranks; ++rank) pointers.push_back(memory_->view(rank));
  cuda_check(cudaMemsetAsync(own, 0, sizeof(OwnWords), side_.get()), "clearing the state of collectives");
  cuda_check(cudaMemcpyAsync(views, pointers.data(), pointers.size() * sizeof(std::byte*), cudaMemcpyDefault, side_.get()),
             "filling the table of arenas");
  cuda_check(cudaStreamSynchronize(side_.get()), "preparing collectives");
}

void LaneArena::read(void* to, int owner, std::int64_t offset, std::size_t bytes) const {
  cuda_check(cudaMemcpyAsync(to, memory_->view(owner) + offset, bytes, cudaMemcpyDefault, side_.get()), "reading the state of collectives");
  cuda_check(cudaStreamSynchronize(side_.get()), "reading the state of collectives");
}

std::string LaneArena::reason_of(int peer) const {
  struct Reason {
    char text[protocol::kReasonBytes];
  };
  const std::int64_t box = context_.layout.mailboxes + peer * context_.layout.mailbox_bytes;
  const auto reason = read<Reason>(context_.rank, box + static_cast<std::int64_t>(offsetof(protocol::DeviceMailbox, reason)));
  return {reason.text, strnlen(reason.text, sizeof reason.text)};
}

protocol::DeviceBeacon LaneArena::beacon_of(int peer) const { return read<protocol::DeviceBeacon>(peer, context_.layout.beacon); }

protocol::CollectiveHeader LaneArena::header_of(int owner, int writer, std::uint64_t call) const {
  return read<protocol::CollectiveHeader>(owner, lanes_.header(writer, call));
}

}  // namespace tokenyard::collective_internal
