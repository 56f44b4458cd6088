#pragma once
// Waiting for peers: with a deadline, noticing their death, abort, failure or disagreement, and blaming the right one.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "core/deadline.h"
#include "core/expected.h"
#include "core/interrupt.h"
#include "exchange/direct_arena.h"
#include "protocol/call.h"
#include "tokenyard/exchange.h"
#include "tokenyard/world.h"

namespace tokenyard::exchange_internal {

class PeerWait {
 public:
  PeerWait(World world, const DirectArena& arena, int timeout_ms);

  // Waits until arrived(peer) holds for every peer. `arrived` reads flags with acquire.
  template <class Arrived>
  Expected<void> for_all(Phase phase, const protocol::CallHeader& header, Arrived&& arrived) {
    std::vector<int> missing;
    for (int peer = 0; peer < arena_.ranks(); ++peer) {
      if (!arrived(peer)) missing.push_back(peer);
    }
    if (missing.empty()) return {};
    const auto begin = std::chrono::steady_clock::now();
    auto all_arrived = [&] {
      std::erase_if(missing, [&](int peer) {
        const bool is_there = arrived(peer);
        if (is_there) add_wait(header.operation, peer, begin);
        return is_there;
      });
      return missing.empty();
    };
    const std::function<bool(int)> pending = [&](int peer) {
      return std::find(missing.begin(), missing.end(), peer) != missing.end() && !arrived(peer);
    };
    Watch watch(*this, phase, header);
    if (wait_on(
            arena_.doorbell(arena_.rank()), all_arrived, [&] { return watch.gave_up(pending); }, spins_))
      return {};
    for (const int peer : missing) add_wait(header.operation, peer, begin);
    return unexpected(watch.failure());
  }

  PeerWaits waits() const;

  // What this rank tells its peers about itself.
  void publish_failure(const protocol::CallHeader& header, const Failure& failure);
  void clear_failure();
  void publish_abort(std::uint64_t call, const std::string& reason);
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }

 private:
  // One wait that lasts: publishes whom this rank waits for, and looks about every millisecond whether that makes sense.
  class Watch {
   public:
    Watch(PeerWait& owner, Phase phase, const protocol::CallHeader& header);
    ~Watch();
    bool gave_up(const std::function<bool(int)>& pending);
    const Failure& failure() const { return failure_; }

   private:
    bool fail(FailureKind kind, int peer, std::string detail);
    bool check_peer(int peer);
    PeerWait& owner_;
    Phase phase_;
    const protocol::CallHeader& header_;
    Deadline deadline_;
    Failure failure_;
    std::chrono::steady_clock::time_point ask_at_ = std::chrono::steady_clock::now() + kInterruptTick;
  };

  // From `begin` until now.
  void add_wait(protocol::Operation operation, int peer, std::chrono::steady_clock::time_point begin);
  bool check_abort(int peer, std::uint64_t call, std::string& reason) const;
  int end_of_chain(int peer) const;

  World world_;
  const DirectArena& arena_;
  int timeout_ms_;
  int spins_;
  std::vector<std::atomic<std::int64_t>> dispatch_ns_;  // [R]; added to by whichever thread makes a call, read by others
  std::vector<std::atomic<std::int64_t>> combine_ns_;
  std::atomic<bool> cancelled_{false};
};

// "dispatch call 7 (token_major, throughput, 14336-byte rows, top_k 8, placement 1f00c0ffee)", for mismatches.
std::string describe(const protocol::CallHeader& header);

}  // namespace tokenyard::exchange_internal
