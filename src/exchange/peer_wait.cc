#include "exchange/peer_wait.h"

#include <fmt/core.h>

#include <algorithm>
#include <cstring>
#include <ctime>

#include "protocol/flags.h"
#include "protocol/wait_chain.h"

namespace tokenyard::exchange_internal {
namespace {

using protocol::AbortRecord;
using protocol::Beacon;
using protocol::CallHeader;
using protocol::load_acquire;
using protocol::store_release;

// CLOCK_MONOTONIC is one clock for all processes of a host.
std::uint64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000U + static_cast<std::uint64_t>(now.tv_nsec);
}

void copy_text(char (&to)[protocol::kReasonBytes], const std::string& text) {
  const std::size_t length = std::min(text.size(), sizeof to - 1);
  std::memcpy(to, text.data(), length);
  to[length] = '\0';
}

}  // namespace

std::string describe(const CallHeader& header) {
  const bool is_dispatch = header.operation == protocol::Operation::dispatch;
  std::string text = fmt::format("{} call {} ({}, {}, {}-byte rows", is_dispatch ? "dispatch" : "combine", header.call,
                                 name(static_cast<Layout>(header.layout)), name(static_cast<Mode>(header.mode)), header.row_bytes);
  if (header.scale_bytes != 0) text += fmt::format(", {}-byte scales", header.scale_bytes);
  text += fmt::format(", top_k {}, placement {:x}", header.top_k, header.placement_hash);
  if (header.handle_call != 0) text += fmt::format(", handle of call {}", header.handle_call);
  if (!is_dispatch) {
    text += fmt::format(", {}, weighting {}{}{}", name(static_cast<Dtype>(header.dtype)), name(static_cast<Weighting>(header.weighting)),
                        header.unfolded != 0 ? ", fold = false" : "", header.row_weights != 0 ? ", row_weights" : "");
  }
  return text + ")";
}

PeerWait::PeerWait(World world, const DirectArena& arena, int timeout_ms)
    : world_(std::move(world)),
      arena_(arena),
      timeout_ms_(timeout_ms),
      spins_(spins_for(arena.ranks())),
      dispatch_ns_(arena.ranks()),
      combine_ns_(arena.ranks()) {}

void PeerWait::add_wait(protocol::Operation operation, int peer, std::chrono::steady_clock::time_point begin) {
  auto& waited = operation == protocol::Operation::combine ? combine_ns_ : dispatch_ns_;
  const auto duration = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin);
  waited[peer].fetch_add(duration.count(), std::memory_order_relaxed);
}

PeerWaits PeerWait::waits() const { return {{dispatch_ns_.begin(), dispatch_ns_.end()}, {combine_ns_.begin(), combine_ns_.end()}}; }

PeerWait::Watch::Watch(PeerWait& owner, Phase phase, const CallHeader& header)
    : owner_(owner), phase_(phase), header_(header), deadline_(Deadline::after_ms(owner.timeout_ms_)) {
  Beacon& mine = owner_.arena_.beacon(owner_.arena_.rank());
  store_release(mine.call, header.call);
  store_release(mine.phase, static_cast<std::uint32_t>(phase));
}

PeerWait::Watch::~Watch() { store_release(owner_.arena_.beacon(owner_.arena_.rank()).waiting_on, 0U); }

bool PeerWait::Watch::fail(FailureKind kind, int peer, std::string detail) {
  failure_ = Failure{.kind = kind,
                     .phase = phase_,
                     .rank = owner_.arena_.rank(),
                     .peer = peer,
                     .epoch = header_.call,
                     .expected = static_cast<std::int64_t>(header_.call),
                     .seen = 0,
                     .detail = std::move(detail)};
  failure_.seen = static_cast<std::int64_t>(load_acquire(owner_.arena_.mailbox(owner_.arena_.rank(), peer).left));
  return true;
}

// Whether a pending peer will never arrive.
bool PeerWait::Watch::check_peer(int peer) {
  std::string reason;
  if (owner_.check_abort(peer, header_.call, reason)) return fail(FailureKind::aborted, peer, std::move(reason));
  for (int kind = 0; kind < protocol::kMessageKinds; ++kind) {
    const auto& message = owner_.arena_.message(owner_.arena_.rank(), peer, static_cast<protocol::MessageKind>(kind), header_.call);
    if (load_acquire(message.sequence) == header_.call && !(message.header == header_)) {
      return fail(FailureKind::mismatch, peer,
                  fmt::format("rank {} made {}; rank {} made {}", owner_.arena_.rank(), describe(header_), peer, describe(message.header)));
    }
  }
  const Beacon& beacon = owner_.arena_.beacon(peer);
  if (load_acquire(beacon.failed) != 0) {
    const int blamed = static_cast<int>(beacon.failed_peer) - 1;
    const auto kind = static_cast<FailureKind>(beacon.failed_kind);
    if (blamed >= 0) peer = blamed;
    return fail(kind, peer,
                fmt::format("another rank failed first, in {}: {}", name(static_cast<Phase>(beacon.failed_phase)), beacon.failed_detail));
  }
  if (!owner_.world_.alive(peer)) return fail(FailureKind::peer_lost, peer, "its process ended, or its thread gave up");
  return false;
}

bool PeerWait::Watch::gave_up(const std::function<bool(int)>& pending) {
  if (owner_.cancelled_.load(std::memory_order_relaxed))
    return fail(FailureKind::system, owner_.arena_.rank(), "the exchange is being destroyed");
  if (const auto now = std::chrono::steady_clock::now(); now >= ask_at_) {
    ask_at_ = now + kInterruptTick;
    if (interrupted()) return fail(FailureKind::system, owner_.arena_.rank(), kInterrupted);
  }
  int first = -1;
  for (int peer = 0; peer < owner_.arena_.ranks(); ++peer) {
    if (!pending(peer)) continue;
    if (first < 0) first = peer;
    // It may have arrived after `pending` was read, and then failed, or gone on to a call that says other things.
    if (check_peer(peer) && pending(peer)) return true;
  }
  if (first < 0) return false;
  Beacon& mine = owner_.arena_.beacon(owner_.arena_.rank());
  store_release(mine.waiting_on, static_cast<std::uint32_t>(first + 1));
  store_release(mine.heartbeat_ns, now_ns());
  if (!deadline_.expired()) return false;
  const int blamed = owner_.end_of_chain(first);
  std::string detail = fmt::format("no sign within {} ms", owner_.timeout_ms_);
  if (blamed != first) detail += fmt::format("; rank {} waits for it, directly or not", first);
  return fail(FailureKind::timeout, blamed, std::move(detail));
}

bool PeerWait::check_abort(int peer, std::uint64_t call, std::string& reason) const {
  const AbortRecord& record = arena_.beacon(peer).aborts[call % protocol::kAborts];
  const std::uint64_t rejected = load_acquire(record.call);
  if (rejected < call) return false;
  reason =
      rejected == call ? std::string(record.reason) : fmt::format("rejected this and later calls; of call {}: {}", rejected, record.reason);
  return true;
}

// Follows who waits for whom. A rank whose heartbeat is old is not waiting but stopped: the chain ends there.
int PeerWait::end_of_chain(int peer) const {
  const std::uint64_t fresh_ns = std::min<std::uint64_t>(1000, static_cast<std::uint64_t>(timeout_ms_) / 2) * 1'000'000U;
  return protocol::end_of_chain(arena_.rank(), arena_.ranks(), peer, [&](int rank) {
    const Beacon& beacon = arena_.beacon(rank);
    const int next = static_cast<int>(load_acquire(beacon.waiting_on)) - 1;
    const bool is_fresh = load_acquire(beacon.heartbeat_ns) + fresh_ns >= now_ns();
    return is_fresh ? next : -1;
  });
}

void PeerWait::publish_failure(const CallHeader& header, const Failure& failure) {
  Beacon& mine = arena_.beacon(arena_.rank());
  store_release(mine.call, header.call);
  mine.failed_kind = static_cast<std::uint32_t>(failure.kind);
  mine.failed_phase = static_cast<std::uint32_t>(failure.phase);
  mine.failed_peer = static_cast<std::uint32_t>(failure.peer + 1);
  copy_text(mine.failed_detail, failure.detail);
  store_release(mine.failed, std::uint64_t{1});  // release: publishes the fields above
  for (int peer = 0; peer < arena_.ranks(); ++peer) ring(arena_.doorbell(peer));
}

void PeerWait::clear_failure() { store_release(arena_.beacon(arena_.rank()).failed, std::uint64_t{0}); }

void PeerWait::publish_abort(std::uint64_t call, const std::string& reason) {
  AbortRecord& record = arena_.beacon(arena_.rank()).aborts[call % protocol::kAborts];
  copy_text(record.reason, reason);
  store_release(record.call, call);  // release: publishes the reason
  for (int peer = 0; peer < arena_.ranks(); ++peer) ring(arena_.doorbell(peer));
}

}  // namespace tokenyard::exchange_internal
