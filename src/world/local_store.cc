#include "world/local_store.h"

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
    if (changed_.wait_until(lock, deadline.at()) == std::cv_status::timeout) ledger_.expire(Deadline::Clock::now());
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
