#include "exchange/direct_transport.h"

#include <fmt/core.h>

#include <algorithm>
#include <cstring>

#include "core/log.h"
#include "protocol/flags.h"

namespace tokenyard::exchange_internal {

using protocol::CallHeader;
using protocol::load_acquire;
using protocol::Message;
using protocol::MessageKind;
using protocol::store_release;

Expected<std::unique_ptr<RowTransport>> DirectTransport::create(const World& world, const ExchangeOptions& options,
                                                                const protocol::ArenaShape& shape, ThreadPool& pool) {
  const auto bytes = static_cast<std::size_t>(host_arena_layout(shape).total);
  auto memory = SymmetricMemory::create(world, bytes, options.transport, Deadline::after_ms(options.timeout_ms));
  if (!memory) return unexpected(memory.error());
  log_info("exchange: {} ranks, {} memory, {} bytes per rank", world.size(), name((*memory)->transport()), bytes);
  auto arena = std::make_shared<DirectArena>(std::move(*memory), shape, world.rank());
  return std::make_unique<DirectTransport>(world, options, std::move(arena), pool);
}

DirectTransport::DirectTransport(const World& world, const ExchangeOptions& options, std::shared_ptr<DirectArena> arena, ThreadPool& pool)
    : world_(world), arena_(std::move(arena)), pool_(pool), wait_(world, *arena_, options.timeout_ms), link_bytes_(world.size(), 0) {
  grants_ = std::make_shared<Grants>();
  grants_->arena = arena_;
  // The board's callback must not own the board: weak, and alive whenever a lease is.
  grants_->board = std::make_shared<LeaseBoard>(options.depth, [grants = std::weak_ptr<Grants>(grants_), arena = arena_](int buffer) {
    if (const auto alive = grants.lock()) alive->publish(buffer);
  });
  grants_->board->restart([] {}, [&](int buffer) { grants_->publish(buffer); });
}

void DirectTransport::Grants::publish(int buffer) {
  const std::uint64_t epoch = next_epoch++;
  for (int source = 0; source < arena->ranks(); ++source) {
    // release: peers write this buffer after everything this rank read from it
    store_release(arena->mailbox(source, arena->rank()).grants[epoch % protocol::kMaxDepth], protocol::pack_grant(epoch, buffer));
    ring(arena->doorbell(source));
  }
}

void DirectTransport::send(int peer, MessageKind kind, const CallHeader& header, MessageExtra extra) {
  Message& message = arena_->message(peer, arena_->rank(), kind, header.call);
  message.header = header;
  message.count = extra.count;
  message.pulled = extra.pulled ? 1 : 0;
  store_release(message.sequence, header.call);  // release: publishes the message and the payload before it
  ring(arena_->doorbell(peer));
}

Expected<void> DirectTransport::await(Phase phase, MessageKind kind, const CallHeader& header) {
  const int rank = arena_->rank();
  auto arrived = wait_.for_all(
      phase, header, [&](int peer) { return load_acquire(arena_->message(rank, peer, kind, header.call).sequence) == header.call; });
  if (!arrived) return arrived;
  for (int peer = 0; peer < arena_->ranks(); ++peer) {
    const CallHeader& theirs = arena_->message(rank, peer, kind, header.call).header;
    if (theirs == header) continue;
    Failure failure{.kind = FailureKind::mismatch, .phase = phase, .rank = rank, .peer = peer, .epoch = header.call};
    failure.detail = fmt::format("rank {} made {}; rank {} made {}", rank, describe(header), peer, describe(theirs));
    return unexpected(std::move(failure));
  }
  return {};
}

Expected<void> DirectTransport::begin_call(const CallHeader& header) {
  if (unsettled_call_ == 0) return {};
  // Until every rank has left the rejected call, one that came late may still write what it was about.
  auto settled = wait_.for_all(Phase::dispatch_credit, header,
                               [&](int peer) { return load_acquire(arena_->mailbox(arena_->rank(), peer).left) >= unsettled_call_; });
  if (!settled) return settled;
  // Who has left it reads no partial sums any more, though nobody has said so for the rejected call.
  unsettled_call_ = last_combine_ = 0;
  last_pull_ = {};
  return {};
}

void DirectTransport::end_call(const CallHeader& header, const Failure* failure) {
  if (failure != nullptr && failure->kind == FailureKind::aborted) {
    unsettled_call_ = header.call;
  } else if (failure != nullptr) {
    wait_.publish_failure(header, *failure);
  }
  for (int peer = 0; peer < arena_->ranks(); ++peer) {
    store_release(arena_->mailbox(peer, arena_->rank()).left, header.call);
    if (failure != nullptr) ring(arena_->doorbell(peer));
  }
}

void DirectTransport::reject_call(std::uint64_t call, const std::string& reason) {
  wait_.publish_abort(call, reason);
  const Failure aborted{.kind = FailureKind::aborted};
  end_call(CallHeader{.call = call}, &aborted);
}

Expected<std::uint64_t> DirectTransport::reset(std::uint64_t last_call) {
  // All ranks are out of every call once they have met here. Numbers only grow, so that nothing old can be mistaken for
  // something new; leases that come back meanwhile move the epoch by at most `depth`, which the margin covers.
  const std::uint64_t mine[2] = {last_call, grants_->next_epoch};
  std::uint64_t agreed[2] = {0, 0};
  for (const auto& bytes : world_.all_gather(std::as_bytes(std::span(mine)))) {
    std::uint64_t theirs[2];
    std::memcpy(theirs, bytes.data(), sizeof theirs);
    for (int i = 0; i < 2; ++i) agreed[i] = std::max(agreed[i], theirs[i]);
  }
  wait_.clear_failure();
  unsettled_call_ = last_combine_ = 0;
  last_pull_ = {};
  dispatch_epoch_ = agreed[1] + std::uint64_t{2} * protocol::kMaxDepth;
  world_.barrier();  // nobody sees a failure that is over
  grants_->board->restart([&] { grants_->next_epoch = dispatch_epoch_; }, [&](int buffer) { grants_->publish(buffer); });
  return agreed[0];
}

}  // namespace tokenyard::exchange_internal
