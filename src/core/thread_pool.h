#pragma once
// Fork-join over index ranges. One pool belongs to one owner; calls are serialised by it.

#include <cstdint>
#include <functional>
#include <memory>

namespace tokenyard {

class ThreadPool {
 public:
  // num_threads >= 1 counts the calling thread: 1 starts no thread.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  int num_threads() const;
  // Splits [0, count) into num_threads contiguous parts (thread i gets part i) and runs body(begin, end, thread).
  // Ranges shorter than `grain` per thread run on fewer threads. The first exception is rethrown after all have ended.
  void parallel_for(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t, int)>& body);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tokenyard
