#include "memory/doorbell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>
#include <thread>

namespace tokenyard {
namespace {

std::uint32_t* word(std::atomic<std::uint32_t>& value) { return reinterpret_cast<std::uint32_t*>(&value); }

}  // namespace

void ring(Doorbell& doorbell) {
  // seq_cst on both sides: either the ringer sees the sleeper, or the sleeper sees the ring before it sleeps.
  doorbell.rings.fetch_add(1, std::memory_order_seq_cst);
  if (doorbell.sleepers.load(std::memory_order_seq_cst) == 0) return;
  // Not FUTEX_PRIVATE: the word may be in memory shared between processes.
  syscall(SYS_futex, word(doorbell.rings), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void sleep_until_rung(Doorbell& doorbell, std::uint32_t seen, std::chrono::microseconds at_most) {
  const timespec timeout{.tv_sec = at_most.count() / 1'000'000, .tv_nsec = at_most.count() % 1'000'000 * 1000};
  doorbell.sleepers.fetch_add(1, std::memory_order_seq_cst);
  syscall(SYS_futex, word(doorbell.rings), FUTEX_WAIT, seen, &timeout, nullptr, 0);
  doorbell.sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

int spins_for(int ranks) { return ranks > static_cast<int>(std::thread::hardware_concurrency()) ? 0 : kSpins; }

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace tokenyard
