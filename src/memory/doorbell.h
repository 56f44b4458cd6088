#pragma once
// Sleeping until a peer has changed something here: a futex word in the waiter's own memory, valid between processes.

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace tokenyard {

// Lives in zero-filled symmetric memory.
struct alignas(64) Doorbell {
  std::atomic<std::uint32_t> rings;
  std::atomic<std::uint32_t> sleepers;
};

// Called by a peer after its release stores. Costs a system call only when somebody sleeps.
void ring(Doorbell& doorbell);

// Returns when the doorbell was rung since `seen` was read from it, or after `at_most`, or spuriously.
void sleep_until_rung(Doorbell& doorbell, std::uint32_t seen, std::chrono::microseconds at_most);

// One step of a busy wait that leaves the core to its sibling.
void relax();

constexpr int kSpins = 200;
// Where ranks outnumber cores, the peer that a spinning rank waits for may need this very core.
int spins_for(int ranks);
// Longer than a small call takes, because sleeping and being woken cost as much as one; a yield gives the core to who needs it.
constexpr std::chrono::microseconds kYieldFor{300};
constexpr std::chrono::microseconds kTick{1000};

// Spins briefly, then yields, then sleeps: ranks that share a core must not burn each other's time. `ready()` is the
// condition (acquire loads inside); `tick()` runs about every millisecond and returns true to give up (deadline, lost
// peer). Returns whether the condition held.
template <class Ready, class Tick>
bool wait_on(Doorbell& doorbell, Ready&& ready, Tick&& tick, int spins = kSpins) {
  for (int i = 0; i < spins; ++i) {
    if (ready()) return true;
    relax();
  }
  auto next_tick = std::chrono::steady_clock::now() + kYieldFor;
  while (std::chrono::steady_clock::now() < next_tick) {
    if (ready()) return true;
    sched_yield();
  }
  while (true) {
    const std::uint32_t seen = doorbell.rings.load(std::memory_order_seq_cst);
    if (ready()) return true;
    if (std::chrono::steady_clock::now() >= next_tick) {
      if (tick()) return ready();
      next_tick = std::chrono::steady_clock::now() + kTick;
    }
    sleep_until_rung(doorbell, seen, kTick);
  }
}

}  // namespace tokenyard
