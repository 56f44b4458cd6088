#include "collective/direct.h"

#include <atomic>
#include <chrono>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "collective/call.h"
#include "collective/ordered_sum.h"
#include "collective/staging.h"
#include "core/deadline.h"

namespace tokenyard::collective_internal {
namespace {

// A waiting rank gives a sign of life about every millisecond. One that has been silent for this long is not waiting but
// stopped or computing, so it is the one to blame; many ticks, since ranks may share a core.
constexpr std::int64_t kSilenceNs = 100'000'000;

std::int64_t now_ns() { return std::chrono::nanoseconds(Deadline::Clock::now().time_since_epoch()).count(); }

std::uint64_t pack_failure(const Failure& failure) {
  return (static_cast<std::uint64_t>(failure.kind) + 1) << 32 | static_cast<std::uint32_t>(failure.peer);
}
FailureKind failure_kind(std::uint64_t packed) { return static_cast<FailureKind>((packed >> 32) - 1); }
int failure_peer(std::uint64_t packed) { return static_cast<int>(static_cast<std::uint32_t>(packed)); }

// What remains to be sent to and received from one peer in this call.
struct Lane {
  RowBytes<const std::byte> send;
  RowBytes<std::byte> receive;
  std::int64_t sent = 0;
  std::int64_t received = 0;
  bool sends() const { return sent < send.bytes(); }
  bool receives() const { return received < receive.bytes(); }
};

class DirectCollectives final : public Collectives {
 public:
  DirectCollectives(const World& world, const CollectiveOptions& options, Staging staging)
      : world_(world),
        rank_(world.rank()),
        ranks_(world.size()),
        timeout_ms_(options.timeout_ms),
        staging_(std::move(staging)),
        call_(rank_, ranks_),
        records_(ranks_),
        lanes_(ranks_),
        sum_(rank_, ranks_) {}

  void barrier() override {
    enter([&] { call_.set_barrier(); });
  }
  void all_gather_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out) override {
    enter([&] { call_.set_all_gather(in, counts, out); });
    move_rows();
  }
  void reduce_scatter_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out) override {
    enter([&] { call_.set_reduce_scatter(in, counts, out); });
    reduce_rows();
  }
  void all_to_all_v(const ConstTensorView& in, std::span<const std::int64_t> send_counts, const TensorView& out,
                    std::span<const std::int64_t> receive_counts) override {
    enter([&] { call_.set_all_to_all(in, send_counts, out, receive_counts); });
    move_rows();
  }
  void abandon(const Failure& why) override;
  void cancel() override {
    cancelled_.store(true, std::memory_order_relaxed);
    ring(staging_.doorbell());
  }
  const World& world() const override { return world_; }
  Transport transport() const override { return staging_.transport(); }

 private:
  // Checks this rank's arguments, tells the others, and goes on only when all calls fit together.
  template <class Check>
  void enter(Check&& check);
  CallRecord& next_record();
  void wait_until_all_entered();

  void move_rows();
  void reduce_rows();
  void start_lanes();
  bool send_chunk(int peer);
  bool receive_chunk(int peer);
  bool all_have_chunk() const;
  void reduce_chunk(std::int64_t begin, std::int64_t size);

  // Returns when ready() holds. blocks(peer) says whether this rank waits for something from the peer.
  template <class Ready, class Blocks>
  void wait(Ready&& ready, Blocks&& blocks);
  template <class Blocks>
  std::optional<Failure> diagnose(Blocks&& blocks, bool expired);
  int blame(int peer) const;
  bool is_waiting(int peer) const;
  Failure failure(FailureKind kind, int peer) const;
  Failure cancellation() const {
    return {.kind = FailureKind::system,
            .phase = Phase::collective,
            .rank = rank_,
            .peer = rank_,
            .epoch = call_number_,
            .detail = "cancelled"};
  }
  void give_up(const Failure& why);
  int peer_after(int steps) const { return (rank_ + steps) % ranks_; }

  World world_;
  int rank_;
  int ranks_;
  int timeout_ms_;
  Staging staging_;
  std::uint64_t call_number_ = 0;
  Call call_;
  std::vector<const CallRecord*> records_;
  std::vector<Lane> lanes_;
  OrderedSum sum_;
  Deadline::Clock::time_point next_look_{};
  std::atomic<bool> cancelled_{false};
  std::optional<Failure> gave_up_;  // repeated by every later call: counters no longer fit
};

template <class Check>
void DirectCollectives::enter(Check&& check) {
  CallRecord& record = next_record();
  try {
    check();
  } catch (const UsageError& error) {
    write_rejection(record, error.what());
    staging_.enter(call_number_);
    throw;
  }
  write_record(record, call_, ranks_);
  staging_.enter(call_number_);
  wait_until_all_entered();
  for (int peer = 0; peer < ranks_; ++peer) records_[peer] = &staging_.record(peer, call_number_);
  if (auto disagreement = find_disagreement(records_, rank_)) {
    disagreement->epoch = call_number_;
    throw TransportError(std::move(*disagreement));
  }
}

CallRecord& DirectCollectives::next_record() {
  if (!gave_up_ && cancelled_.load(std::memory_order_relaxed)) give_up(cancellation());
  if (gave_up_) throw TransportError(*gave_up_);
  wait_until_all_entered();  // the previous call; it may have been rejected here without waiting
  ++call_number_;
  staging_.status(rank_).call.store(call_number_, std::memory_order_release);
  return staging_.record(rank_, call_number_);
}

void DirectCollectives::abandon(const Failure& why) {
  if (gave_up_) return;  // the peers know it
  if (why.kind != FailureKind::aborted) return give_up(why);
  write_rejection(next_record(), why.detail);
  staging_.enter(call_number_);
}

void DirectCollectives::give_up(const Failure& why) {
  gave_up_ = why;
  staging_.status(rank_).failure.store(pack_failure(why), std::memory_order_release);
}

void DirectCollectives::wait_until_all_entered() {
  const auto missing = [&](int peer) { return staging_.entered(peer) < call_number_; };
  wait(
      [&] {
        for (int i = 1; i < ranks_; ++i) {
          if (missing(peer_after(i))) return false;
        }
        return true;
      },
      missing);
}

// Sends and receives whatever can go, peer by peer, until nothing is left. Each peer has its own slots and credits, so a
// slow one holds up nobody else.
void DirectCollectives::move_rows() {
  start_lanes();
  bool left = true;
  while (left) {
    bool moved = false;
    left = false;
    for (int i = 1; i < ranks_; ++i) {
      const int peer = peer_after(i);
      moved |= send_chunk(peer);
      moved |= receive_chunk(peer);
      left |= lanes_[peer].sends() || lanes_[peer].receives();
    }
    if (moved || !left) continue;
    const auto can_move = [&](int peer) {
      return (lanes_[peer].sends() && staging_.has_room(peer)) || (lanes_[peer].receives() && staging_.has_chunk(peer));
    };
    wait(
        [&] {
          for (int i = 1; i < ranks_; ++i) {
            if (can_move(peer_after(i))) return true;
          }
          return false;
        },
        [&](int peer) {
          return (lanes_[peer].sends() && !staging_.has_room(peer)) || (lanes_[peer].receives() && !staging_.has_chunk(peer));
        });
  }
}

// As move_rows, but chunk n is taken once it is there from every source, and added up in rank order straight from the slots.
void DirectCollectives::reduce_rows() {
  start_lanes();
  const std::int64_t total = call_.receive_bytes(rank_).bytes();
  std::int64_t reduced = 0;
  const auto receives = [&] { return reduced < total; };
  while (true) {
    bool moved = false, left = false;
    for (int i = 1; i < ranks_; ++i) {
      const int peer = peer_after(i);
      moved |= send_chunk(peer);
      left |= lanes_[peer].sends();
    }
    if (receives() && all_have_chunk()) {
      const std::int64_t size = std::min(staging_.slot_bytes(), total - reduced);
      reduce_chunk(reduced, size);
      reduced += size;
      moved = true;
    }
    if (!left && !receives()) return;
    if (moved) continue;
    wait(
        [&] {
          if (receives() && all_have_chunk()) return true;
          for (int i = 1; i < ranks_; ++i) {
            if (lanes_[peer_after(i)].sends() && staging_.has_room(peer_after(i))) return true;
          }
          return false;
        },
        [&](int peer) { return (receives() && !staging_.has_chunk(peer)) || (lanes_[peer].sends() && !staging_.has_room(peer)); });
  }
}

// Peers get their first chunk before this rank looks after its own rows.
void DirectCollectives::start_lanes() {
  for (int i = 1; i < ranks_; ++i) {
    const int peer = peer_after(i);
    lanes_[peer] = {.send = call_.send_bytes(peer), .receive = call_.receive_bytes(peer)};
    send_chunk(peer);
  }
  const bool keeps_own = call_.operation() != Operation::reduce_scatter_v && !call_.in_place();
  if (keeps_own) copy_rows(call_.receive_bytes(rank_), call_.send_bytes(rank_));
}

bool DirectCollectives::send_chunk(int peer) {
  Lane& lane = lanes_[peer];
  if (!lane.sends() || !staging_.has_room(peer)) return false;
  const std::int64_t size = std::min(staging_.slot_bytes(), lane.send.bytes() - lane.sent);
  pack(staging_.free_slot(peer), lane.send, lane.sent, size);
  staging_.publish(peer);
  lane.sent += size;
  return true;
}

bool DirectCollectives::receive_chunk(int peer) {
  Lane& lane = lanes_[peer];
  if (!lane.receives() || !staging_.has_chunk(peer)) return false;
  const std::int64_t size = std::min(staging_.slot_bytes(), lane.receive.bytes() - lane.received);
  unpack(lane.receive, lane.received, size, staging_.chunk(peer));
  staging_.consume(peer);
  lane.received += size;
  return true;
}

bool DirectCollectives::all_have_chunk() const {
  for (int i = 1; i < ranks_; ++i) {
    if (!staging_.has_chunk(peer_after(i))) return false;
  }
  return true;
}

void DirectCollectives::reduce_chunk(std::int64_t begin, std::int64_t size) {
  for (int i = 1; i < ranks_; ++i) sum_.terms()[peer_after(i)] = staging_.chunk(peer_after(i));
  sum_.add(call_, begin, size);
  for (int i = 1; i < ranks_; ++i) staging_.consume(peer_after(i));
}

template <class Ready, class Blocks>
void DirectCollectives::wait(Ready&& ready, Blocks&& blocks) {
  std::optional<Failure> failure;
  // A long call among the living must not hide that somebody died: look now and then although chunks keep coming.
  if (Deadline::Clock::now() >= next_look_) failure = diagnose(blocks, false);
  if (!failure) {
    std::optional<Deadline> deadline;  // set at the first tick: most waits end before
    const bool held = wait_on(staging_.doorbell(), ready, [&] {
      if (!deadline) deadline = Deadline::after_ms(timeout_ms_);
      failure = diagnose(blocks, deadline->expired());
      return failure.has_value();
    });
    if (held) failure.reset();
  }
  if (failure) {
    give_up(*failure);
    throw TransportError(std::move(*failure));
  }
  staging_.status(rank_).waiting_on.store(0, std::memory_order_release);
}

// One look at the peers that this rank waits for, about every millisecond. What a peer did before it died or gave up counts.
template <class Blocks>
std::optional<Failure> DirectCollectives::diagnose(Blocks&& blocks, bool expired) {
  next_look_ = Deadline::Clock::now() + kTick;
  if (cancelled_.load(std::memory_order_relaxed)) return cancellation();
  int first = -1;
  for (int i = 1; i < ranks_; ++i) {
    const int peer = peer_after(i);
    if (!blocks(peer)) continue;
    if (first < 0) first = peer;
    const std::uint64_t packed = staging_.status(peer).failure.load(std::memory_order_acquire);
    const bool is_alive = world_.alive(peer);
    if ((packed == 0 && is_alive) || !blocks(peer)) continue;
    if (packed != 0) {
      const int named = failure_peer(packed);
      Failure why = failure(failure_kind(packed), named >= 0 ? named : peer);
      why.detail = "rank " + std::to_string(peer) + " gave up before" + (why.detail.empty() ? "" : "; " + why.detail);
      return why;
    }
    return failure(FailureKind::peer_lost, peer);
  }
  Status& mine = staging_.status(rank_);
  mine.waiting_on.store(first + 1, std::memory_order_release);
  mine.sign_of_life_ns.store(now_ns(), std::memory_order_release);
  if (!expired || first < 0) return std::nullopt;
  return failure(FailureKind::timeout, blame(first));
}

// Follows who waits for whom to a rank that does not wait: it is outside the call, stopped, or computing.
int DirectCollectives::blame(int peer) const {
  for (int hops = 0; hops < ranks_; ++hops) {
    if (const std::uint64_t packed = staging_.status(peer).failure.load(std::memory_order_acquire)) return failure_peer(packed);
    if (!is_waiting(peer)) return peer;
    const int next = staging_.status(peer).waiting_on.load(std::memory_order_acquire) - 1;
    if (next < 0 || next == rank_) return peer;
    peer = next;
  }
  return peer;
}

bool DirectCollectives::is_waiting(int peer) const {
  const Status& status = staging_.status(peer);
  if (status.waiting_on.load(std::memory_order_acquire) == 0) return false;
  return now_ns() - status.sign_of_life_ns.load(std::memory_order_acquire) < kSilenceNs;
}

Failure DirectCollectives::failure(FailureKind kind, int peer) const {
  Failure failure{.kind = kind, .phase = Phase::collective, .rank = rank_, .peer = peer, .epoch = call_number_};
  if (kind == FailureKind::timeout && peer != rank_) {
    failure.expected = static_cast<std::int64_t>(call_number_);
    failure.seen = static_cast<std::int64_t>(staging_.status(peer).call.load(std::memory_order_acquire));
    failure.detail = "expected and seen are its call numbers; it did not come, is stopped, or needs a longer timeout_ms (now " +
                     std::to_string(timeout_ms_) + ")";
  }
  return failure;
}

}  // namespace

std::unique_ptr<Collectives> make_direct(const World& world, const CollectiveOptions& options) {
  // Slots are multiples of a cache line, so of every element size too.
  const std::int64_t slot_bytes = options.staging_bytes / Staging::kSlots / 64 * 64;
  auto memory = value_or_throw(SymmetricMemory::create(world, Staging::memory_bytes(world.size(), slot_bytes), options.transport,
                                                       Deadline::after_ms(options.timeout_ms)));
  return std::make_unique<DirectCollectives>(world, options, Staging(std::move(memory), world.rank(), world.size(), slot_bytes));
}

}  // namespace tokenyard::collective_internal
