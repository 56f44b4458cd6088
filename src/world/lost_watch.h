#pragma once
// Looks, every few milliseconds, whether a rank has ended, and tells the kernels that may be waiting for it.

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "tokenyard/world.h"

namespace tokenyard {

class LostWatch {
 public:
  // on_lost(rank) runs once, on the watch's thread, for the first rank that is lost.
  LostWatch(World world, std::function<void(int)> on_lost);
  ~LostWatch();

 private:
  void run();

  World world_;
  std::function<void(int)> on_lost_;
  std::mutex mutex_;
  std::condition_variable ending_;
  bool ends_ = false;
  std::thread thread_;
};

}  // namespace tokenyard
