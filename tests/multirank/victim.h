#pragma once
// A rank process that is killed, or stopped, at a place of its own choice, and what the others know of it.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <string>

namespace tokenyard::exchange_test {

// In a file that all rank processes map.
struct Scoreboard {
  std::atomic<std::int64_t> ended_ns;  // when the victim died or stopped
  std::atomic<int> victim_pid;
  std::atomic<int> reported;  // survivors that are done
};

inline std::int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

inline Scoreboard* scoreboard = nullptr;  // of this process; a signal handler may need it
inline int end_signal = 0;

inline void map_scoreboard(const std::string& path) {
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  ASSERT_GE(file, 0) << path;
  ASSERT_EQ(ftruncate(file, sizeof(Scoreboard)), 0);
  void* memory = mmap(nullptr, sizeof(Scoreboard), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  ASSERT_NE(memory, MAP_FAILED);
  scoreboard = static_cast<Scoreboard*>(memory);
}

// Ends this process here and now. What it does is safe in a signal handler.
inline void end_here() {
  scoreboard->victim_pid.store(getpid());
  scoreboard->ended_ns.store(now_ns());
  kill(getpid(), end_signal);
  while (true) pause();  // a stopped process that is woken has nothing left to do
}

// By every survivor: the last one of `survivors` ends a victim that is only stopped, for whom the launcher would wait.
inline void report_done(int survivors) {
  if (scoreboard->reported.fetch_add(1) + 1 == survivors) kill(scoreboard->victim_pid.load(), SIGKILL);
}

}  // namespace tokenyard::exchange_test
