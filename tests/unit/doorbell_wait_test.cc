#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <atomic>
#include <thread>

#include "memory/doorbell.h"

namespace tokenyard {
namespace {

using Clock = std::chrono::steady_clock;

TEST(DoorbellWait, ARingEndsALongSleep) {
  Doorbell doorbell{};
  std::thread ringer([&] {
    while (doorbell.sleepers.load() == 0) std::this_thread::yield();
    ring(doorbell);
  });
  const auto begin = Clock::now();
  Sleeper(doorbell).sleep(0, std::chrono::seconds(60));
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(30));
  ringer.join();
  EXPECT_EQ(doorbell.rings.load(), 1U);
  EXPECT_EQ(doorbell.sleepers.load(), 0U);
}

TEST(DoorbellWait, ARingBeforeTheSleepIsNotLost) {
  Doorbell doorbell{};
  const Sleeper sleeper(doorbell);
  const std::uint32_t seen = sleeper.rings();
  ring(doorbell);
  const auto begin = Clock::now();
  sleeper.sleep(seen, std::chrono::seconds(60));
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(30));
}

TEST(DoorbellWait, ARingForNobodyChangesNothing) {
  Doorbell doorbell{};
  ring(doorbell);
  EXPECT_EQ(doorbell.rings.load(), 0U);
}

TEST(DoorbellWait, ASleepEndsInTime) {
  Doorbell doorbell{};
  const auto begin = Clock::now();
  Sleeper(doorbell).sleep(0, std::chrono::milliseconds(20));
  EXPECT_GE(Clock::now() - begin, std::chrono::milliseconds(5));
}

TEST(DoorbellWait, WaitingEndsWhenTickGivesUp) {
  Doorbell doorbell{};
  int ticks = 0;
  EXPECT_FALSE(wait_on(
      doorbell, [] { return false; }, [&] { return ++ticks == 5; }));
  EXPECT_EQ(ticks, 5);
}

TEST(DoorbellWait, WhatBecomesTrueWithTheLastTickCounts) {
  Doorbell doorbell{};
  bool ready = false;
  EXPECT_TRUE(wait_on(
      doorbell, [&] { return ready; }, [&] { return ready = true; }));
}

// Two threads hand a number back and forth, each sleeping for the other. A lost wake-up would cost a tick of a millisecond
// each time; the ticks are counted.
TEST(DoorbellWait, NoWakeUpIsLost) {
  struct Side {
    Doorbell doorbell{};
    std::atomic<int> number{0};
  };
  Side sides[2];
  constexpr int kRounds = 3000;
  const auto play = [&](int me) {
    for (int round = 1; round <= kRounds; ++round) {
      if (me == 0) {
        sides[1].number.store(round, std::memory_order_release);
        ring(sides[1].doorbell);
      }
      ASSERT_TRUE(wait_on(
          sides[me].doorbell, [&] { return sides[me].number.load(std::memory_order_acquire) == round; }, [] { return false; }));
      if (me == 1) {
        sides[0].number.store(round, std::memory_order_release);
        ring(sides[0].doorbell);
      }
    }
  };
  std::thread other([&] { play(1); });
  play(0);
  other.join();
  EXPECT_EQ(sides[0].number.load(), kRounds);
}

// A waiter that burnt its core would take it from the rank it waits for.
TEST(DoorbellWait, WaitingCostsLittleProcessorTime) {
  Doorbell doorbell{};
  const auto used = [] {
    rusage usage{};
    getrusage(RUSAGE_THREAD, &usage);
    return std::chrono::seconds(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           std::chrono::microseconds(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
  };
  const auto before = used();
  const auto until = Clock::now() + std::chrono::milliseconds(300);
  EXPECT_FALSE(wait_on(
      doorbell, [] { return false; }, [&] { return Clock::now() >= until; }));
  EXPECT_LT(used() - before, std::chrono::milliseconds(150));
}

// The futex is not private: the same page mapped twice, as two processes would have it.
TEST(DoorbellWait, RingsReachOtherMappingsOfTheSameMemory) {
  const int fd = memfd_create("doorbell", 0);
  ASSERT_EQ(ftruncate(fd, 4096), 0);
  void* first = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  void* second = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  ASSERT_NE(first, second);
  auto& slept = *static_cast<Doorbell*>(first);
  auto& rung = *static_cast<Doorbell*>(second);
  std::thread ringer([&] {
    while (rung.sleepers.load() == 0) std::this_thread::yield();
    ring(rung);
  });
  const auto begin = Clock::now();
  Sleeper(slept).sleep(0, std::chrono::seconds(60));
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(30));
  ringer.join();
  munmap(first, 4096);
  munmap(second, 4096);
}

}  // namespace
}  // namespace tokenyard
