#pragma once
// A point in time after which a wait gives up.

#include <chrono>

namespace tokenyard {

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;
  static Deadline after_ms(int timeout_ms) { return Deadline(Clock::now() + std::chrono::milliseconds(timeout_ms), timeout_ms); }
  bool expired() const { return Clock::now() >= at_; }
  // For poll() and friends: never negative, rounded up so that a wait does not end early and spin.
  int remaining_ms() const {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(at_ - Clock::now()).count();
    return left > 0 ? static_cast<int>(left) : 0;
  }
  int timeout_ms() const { return timeout_ms_; }
  Clock::time_point at() const { return at_; }

 private:
  Deadline(Clock::time_point at, int timeout_ms) : at_(at), timeout_ms_(timeout_ms) {}
  Clock::time_point at_;
  int timeout_ms_;
};

}  // namespace tokenyard
