#pragma once
// The store of rank threads: the ledger behind a mutex.

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>

#include "world/ledger.h"
#include "world/store.h"

namespace tokenyard::world_internal {

// Shared by the ranks of one in-process world.
class LocalHub {
 public:
  explicit LocalHub(int size);
  Expected<Gathered> gather(int rank, const Call& call, SharedPart mine, Deadline deadline);
  bool lost(int rank) const { return lost_[rank].load(std::memory_order_acquire); }
  void lose(int rank, std::string reason);
  void close(int rank);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::pair<int, GatherKey>, Ledger::Outcome> outcomes_;  // of ranks that have not woken up yet
  Ledger ledger_;
  std::unique_ptr<std::atomic<bool>[]> lost_;
};

class LocalStore final : public Store {
 public:
  LocalStore(std::shared_ptr<LocalHub> hub, int rank) : hub_(std::move(hub)), rank_(rank) {}
  ~LocalStore() override { hub_->close(rank_); }
  Expected<Gathered> gather(const Call& call, SharedPart mine, Deadline deadline) override {
    return hub_->gather(rank_, call, std::move(mine), deadline);
  }
  bool lost(int rank) const override { return hub_->lost(rank); }
  void give_up(std::string_view reason) override { hub_->lose(rank_, std::string(reason)); }

 private:
  std::shared_ptr<LocalHub> hub_;
  int rank_;
};

}  // namespace tokenyard::world_internal
