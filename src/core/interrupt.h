#pragma once
// A caller's wish to give up a wait (Ctrl-C). The waits of exchanges and worlds ask about it now and then.

#include <chrono>

namespace tokenyard {

constexpr std::chrono::milliseconds kInterruptTick{50};

// As long as it lives, waits of this thread call `check` about every kInterruptTick, and give up when it returns true.
class InterruptScope {
 public:
  explicit InterruptScope(bool (*check)());
  ~InterruptScope();
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;

 private:
  bool (*before_)();
};

// Whether a check is in place, so that a long sleep has to be cut into ticks.
bool is_interruptible();
// Asks. False without a scope.
bool interrupted();

inline constexpr const char* kInterrupted = "the caller gave up the wait";

}  // namespace tokenyard
