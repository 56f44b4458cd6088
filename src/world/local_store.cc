#include "world/local_store.h"

#include <algorithm>

#include "core/interrupt.h"
#include "core/usage.h"

namespace tokenyard::world_internal {

LocalHub::LocalHub(int size)
    : ledger_(
          size,
          [this](int rank, GatherKey key, const Ledger::Outcome& outcome) {
            outcomes_.emplace(std::pair(rank, key), outcome);
            changed_.notify_all();
          },
          [this](int rank) { lost_[rank].store(true, std::memory_order_release); }),
      lost_(new std::atomic<bool>[size]()) {}

Expected<Gathered> LocalHub::gather(int rank, const Call& call, SharedPart mine, Deadline deadline) {
  std::unique_lock lock(mutex_);
  const auto refused = ledger_.arrive(rank, call, std::move(mine), deadline);
  TY_ASSERT(!refused);
  while (true) {
    if (auto node = outcomes_.extract({rank, call.key})) return std::move(node.mapped());
    const auto now = Deadline::Clock::now();
    const auto until = is_interruptible() ? std::min(deadline.at(), now + kInterruptTick) : deadline.at();
    if (changed_.wait_until(lock, until) != std::cv_status::timeout) continue;
    if (until == deadline.at()) ledger_.expire(Deadline::Clock::now());
    lock.unlock();  // the check may wait for locks of the caller, whose other threads may wait for this one
    const bool gives_up = interrupted();
    lock.lock();
    if (gives_up) ledger_.lose(rank, kInterrupted);  // fails the gather, here and for the others
  }
}

void LocalHub::lose(int rank, std::string reason) {
  const std::lock_guard lock(mutex_);
  ledger_.lose(rank, std::move(reason));
}

void LocalHub::close(int rank) {
  const std::lock_guard lock(mutex_);
  ledger_.close(rank);
}

}  // namespace tokenyard::world_internal
