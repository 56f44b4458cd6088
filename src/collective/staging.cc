#include "collective/staging.h"

namespace tokenyard::collective_internal {
namespace {

constexpr std::size_t align_up(std::size_t bytes, std::size_t alignment) { return (bytes + alignment - 1) / alignment * alignment; }

}  // namespace

Staging::Offsets::Offsets(int ranks, std::int64_t slot_bytes) {
  record_bytes = align_up(call_record_bytes(ranks), 64);
  counters = sizeof(Doorbell) + sizeof(Status);
  records = counters + sizeof(Counter) * kCounterKinds * ranks;
  slots = align_up(records + 2 * record_bytes, 4096);
  end = slots + static_cast<std::size_t>(ranks) * kSlots * slot_bytes;
}

std::size_t Staging::memory_bytes(int ranks, std::int64_t slot_bytes) { return Offsets(ranks, slot_bytes).end; }

Staging::Staging(std::unique_ptr<SymmetricMemory> memory, int rank, int ranks, std::int64_t slot_bytes)
    : memory_(std::move(memory)),
      rank_(rank),
      ranks_(ranks),
      slot_bytes_(slot_bytes),
      offsets_(ranks, slot_bytes),
      sent_(ranks),
      taken_(ranks) {}

void Staging::enter(std::uint64_t call) {
  for (int i = 0; i < ranks_; ++i) {
    const int peer = (rank_ + i) % ranks_;
    counter(peer, kEntered, rank_).store(call, std::memory_order_release);  // publishes the record to the peer's entered()
    if (peer != rank_) ring(*at<Doorbell>(peer, 0));
  }
}

void Staging::publish(int peer) {
  counter(peer, kArrived, rank_).store(++sent_[peer], std::memory_order_release);  // publishes the chunk to has_chunk()
  ring(*at<Doorbell>(peer, 0));
}

void Staging::consume(int peer) {
  // Release: our reads of the chunk come before the sender's next write, which waits in has_room().
  counter(peer, kConsumed, rank_).store(++taken_[peer], std::memory_order_release);
  ring(*at<Doorbell>(peer, 0));
}

}  // namespace tokenyard::collective_internal
