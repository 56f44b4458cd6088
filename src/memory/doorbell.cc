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

// Between a rank's store and its look at the other's, on both sides: one of the two sees the other's store.
void fence() {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wtsan"  // it does not see this order, and need not: data is ordered by the flags themselves
#endif
  std::atomic_thread_fence(std::memory_order_seq_cst);
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
}

}  // namespace

void ring(Doorbell& doorbell) {
  fence();
  if (doorbell.sleepers.load(std::memory_order_relaxed) == 0) return;
  doorbell.rings.fetch_add(1, std::memory_order_release);
  // Not FUTEX_PRIVATE: the word may be in memory shared between processes.
  syscall(SYS_futex, word(doorbell.rings), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

Sleeper::Sleeper(Doorbell& doorbell) : doorbell_(doorbell) {
  doorbell_.sleepers.fetch_add(1, std::memory_order_relaxed);
  fence();
}

Sleeper::~Sleeper() { doorbell_.sleepers.fetch_sub(1, std::memory_order_relaxed); }

void Sleeper::sleep(std::uint32_t seen, std::chrono::microseconds at_most) const {
  const timespec timeout{.tv_sec = at_most.count() / 1'000'000, .tv_nsec = at_most.count() % 1'000'000 * 1000};
  syscall(SYS_futex, word(doorbell_.rings), FUTEX_WAIT, seen, &timeout, nullptr, 0);
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
