#pragma once
// What lies in each rank's symmetric memory, and the flow control over it.
//
// Rank d's memory holds, per source s, kSlots slots that s fills in turn. Two monotone counters guard them: `arrived`
// (in d's memory, written by s) says how many chunks s has written, `consumed` (in s's memory, written by d) how many d
// has taken out. s writes chunk n only while n - consumed < kSlots, so nothing is overwritten before it was read, and
// filling one slot overlaps with draining the other. Whoever waits polls its own memory and sleeps on its own doorbell.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "collective/agreement.h"
#include "memory/doorbell.h"
#include "memory/symmetric_memory.h"

namespace tokenyard::collective_internal {

// One cache line each, so that peers do not fight for one.
struct alignas(64) Counter {
  std::atomic<std::uint64_t> value;
};

// What a rank tells about its own waiting; read by peers that want to know whom to blame.
struct alignas(64) Status {
  std::atomic<std::uint64_t> call;            // the call it has entered
  std::atomic<std::int32_t> waiting_on;       // 1 + the peer it waits for, 0: none
  std::atomic<std::int64_t> sign_of_life_ns;  // of the steady clock, while it waits
  std::atomic<std::uint64_t> failure;         // 0, or why it gave up for good (pack_failure in direct.cc)
};

class Staging {
 public:
  static constexpr int kSlots = 2;
  static std::size_t memory_bytes(int ranks, std::int64_t slot_bytes);

  Staging(std::unique_ptr<SymmetricMemory> memory, int rank, int ranks, std::int64_t slot_bytes);

  std::int64_t slot_bytes() const { return slot_bytes_; }
  Transport transport() const { return memory_->transport(); }
  Doorbell& doorbell() const { return *at<Doorbell>(rank_, 0); }
  Status& status(int rank) const { return *at<Status>(rank, sizeof(Doorbell)); }

  // A rank's record of a call. Two are kept: a rank enters call c + 2 only after all have entered c + 1, and so have read c.
  CallRecord& record(int rank, std::uint64_t call) const {
    return *at<CallRecord>(rank, offsets_.records + call % 2 * offsets_.record_bytes);
  }
  // Tells all peers that this rank's record of `call` is written.
  void enter(std::uint64_t call);
  std::uint64_t entered(int peer) const { return counter(rank_, kEntered, peer).load(std::memory_order_acquire); }

  // Towards a peer: its free slot, to be written and then published.
  bool has_room(int peer) const { return sent_[peer] - counter(rank_, kConsumed, peer).load(std::memory_order_acquire) < kSlots; }
  std::byte* free_slot(int peer) const { return slot(peer, rank_, sent_[peer]); }
  void publish(int peer);
  // From a peer: its oldest chunk, to be read and then consumed.
  bool has_chunk(int peer) const { return counter(rank_, kArrived, peer).load(std::memory_order_acquire) > taken_[peer]; }
  const std::byte* chunk(int peer) const { return slot(rank_, peer, taken_[peer]); }
  void consume(int peer);

 private:
  enum CounterKind { kEntered, kArrived, kConsumed, kCounterKinds };
  struct Offsets {
    Offsets(int ranks, std::int64_t slot_bytes);
    std::size_t record_bytes, counters, records, slots, end;
  };

  template <class T>
  T* at(int rank, std::size_t offset) const {
    return reinterpret_cast<T*>(memory_->view(rank) + offset);
  }
  std::atomic<std::uint64_t>& counter(int owner, CounterKind kind, int peer) const {
    return at<Counter>(owner, offsets_.counters)[kind * ranks_ + peer].value;
  }
  std::byte* slot(int owner, int source, std::uint64_t chunk) const {
    return memory_->view(owner) + offsets_.slots + (static_cast<std::size_t>(source) * kSlots + chunk % kSlots) * slot_bytes_;
  }

  std::unique_ptr<SymmetricMemory> memory_;
  int rank_;
  int ranks_;
  std::int64_t slot_bytes_;
  Offsets offsets_;
  std::vector<std::uint64_t> sent_;  // chunks per peer since construction
  std::vector<std::uint64_t> taken_;
};

}  // namespace tokenyard::collective_internal
