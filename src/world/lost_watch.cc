#include "world/lost_watch.h"

#include <chrono>

namespace tokenyard {

LostWatch::LostWatch(World world, std::function<void(int)> on_lost)
    : world_(std::move(world)), on_lost_(std::move(on_lost)), thread_([this] { run(); }) {}

LostWatch::~LostWatch() {
  {
    const std::lock_guard lock(mutex_);
    ends_ = true;
  }
  ending_.notify_all();
  thread_.join();
}

void LostWatch::run() {
  constexpr std::chrono::milliseconds kTick{5};
  std::unique_lock lock(mutex_);
  while (!ending_.wait_for(lock, kTick, [this] { return ends_; })) {
    for (int peer = 0; peer < world_.size(); ++peer) {
      if (world_.alive(peer)) continue;
      on_lost_(peer);
      return;
    }
  }
}

}  // namespace tokenyard
