#pragma once
// What tests of failing ranks look at: which error came, and when.

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <thread>

#include "tokenyard/error.h"

namespace tokenyard::world_test {

// The failure that `action` throws.
inline Failure failure_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const TransportError& error) {
    return error.failure();
  }
  ADD_FAILURE() << "no TransportError";
  return {};
}

class Stopwatch {
 public:
  std::int64_t ms() const {
    return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// Waits until the condition holds; returns whether it did in time.
inline bool comes_true(int timeout_ms, const std::function<bool()>& condition) {
  const Stopwatch watch;
  while (!condition()) {
    if (watch.ms() > timeout_ms) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

}  // namespace tokenyard::world_test
