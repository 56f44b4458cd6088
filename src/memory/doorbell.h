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

// Called by a peer after its release stores. While nobody sleeps the bell is only read, so that its line stays in every cache.
void ring(Doorbell& doorbell);

// Says that its thread may sleep: from then on it sees what peers stored before they rang, or they ring for it.
class Sleeper {
 public:
  explicit Sleeper(Doorbell& doorbell);
  ~Sleeper();
  Sleeper(const Sleeper&) = delete;
  Sleeper& operator=(const Sleeper&) = delete;

  // Read before the condition is looked at.
  std::uint32_t rings() const { return doorbell_.rings.load(std::memory_order_acquire); }
  // Returns when the doorbell was rung since `seen` was read from it, or after `at_most`, or spuriously.
  void sleep(std::uint32_t seen, std::chrono::microseconds at_most) const;

 private:
  Doorbell& doorbell_;
};

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
  const Sleeper sleeper(doorbell);
  while (true) {
    const std::uint32_t seen = sleeper.rings();
    if (ready()) return true;
    if (std::chrono::steady_clock::now() >= next_tick) {
      if (tick()) return ready();
      next_tick = std::chrono::steady_clock::now() + kTick;
    }
    sleeper.sleep(seen, kTick);
  }
}

}  // namespace tokenyard
