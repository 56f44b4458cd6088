#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "memory/doorbell.h"
#include "memory/symmetric_memory.h"
#include "multirank/exchange_processes.h"
#include "multirank/world_failures.h"
#include "multirank/world_stopped.h"
#include "tokenyard/error.h"
#include "tokenyard/launch.h"

namespace tokenyard::world_test {
namespace {

using exchange_test::RegisterBody;
using exchange_test::run_processes;
using Memory = std::unique_ptr<SymmetricMemory>;

Memory create(const World& world, std::size_t bytes, Transport transport = Transport::automatic) {
  auto memory = SymmetricMemory::create(world, bytes, transport, Deadline::after_ms(world.timeout_ms()));
  if (!memory) throw TransportError(memory.error());
  return std::move(*memory);
}

// Entries of a folder whose name holds the word.
std::size_t count_entries(const char* folder, std::string_view word = "") {
  std::size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().filename().string().find(word) != std::string::npos) ++count;
  }
  return count;
}

std::size_t count_lines(const char* path, std::string_view word) {
  std::ifstream file(path);
  std::size_t count = 0;
  for (std::string line; std::getline(file, line);) {
    if (line.find(word) != std::string::npos) ++count;
  }
  return count;
}

void expect_ok(const std::vector<RankExit>& exits, int killed = -1) {
  for (const RankExit& exit : exits) EXPECT_EQ(exit.exit_code, exit.rank == killed ? 128 + SIGKILL : 0) << "rank " << exit.rank;
}

const RegisterBody kAgree("memory.agree", [](World& world, const std::string&) {
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{12345}, std::size_t{9} << 20}) {
    const Memory memory = create(world, bytes);
    EXPECT_EQ(memory->transport(), Transport::shm);
    const std::size_t share = memory->bytes() / world.size();
    for (int rank = 0; rank < world.size(); ++rank) {
      EXPECT_EQ(memory->view(rank)[memory->bytes() - 1], std::byte{0});
    }
    world.barrier();
    for (int rank = 0; rank < world.size(); ++rank) std::memset(memory->view(rank) + world.rank() * share, world.rank() + 1, share);
    world.barrier();
    for (int rank = 0; rank < world.size(); ++rank) {
      for (int writer = 0; writer < world.size(); ++writer) {
        EXPECT_EQ(memory->view(rank)[writer * share], std::byte(writer + 1));
        EXPECT_EQ(memory->view(rank)[(writer + 1) * share - 1], std::byte(writer + 1));
      }
    }
    world.barrier();
  }
  EXPECT_THROW(create(world, 4096, Transport::inproc), UsageError);
});

TEST(MemoryProcesses, ViewsAgree) {
  for (const int ranks : {1, 2, 5}) expect_ok(run_processes({.body = "memory.agree", .ranks = ranks}));
}

const RegisterBody kOutlive("memory.outlive", [](World& world, const std::string&) {
  Memory memory = create(world, 1 << 20);
  std::memset(memory->view(world.rank()), world.rank() + 1, memory->bytes());
  world.barrier();
  if (world.rank() == 1) memory.reset();
  if (world.rank() == 2) raise(SIGKILL);
  if (world.rank() != 0) return;
  EXPECT_TRUE(comes_true(5000, [&] { return !world.alive(2); }));
  for (int rank = 0; rank < 3; ++rank) {
    const std::byte* view = memory->view(rank);
    for (std::size_t i = 0; i < memory->bytes(); i += 4096) ASSERT_EQ(view[i], std::byte(rank + 1));
    memory->view(rank)[0] = std::byte{77};
  }
});

TEST(MemoryProcesses, ViewsOutliveTheirOwnersMemoryAndLife) { expect_ok(run_processes({.body = "memory.outlive", .ranks = 3}), 2); }

const RegisterBody kCycles("memory.cycles", [](World& world, const std::string&) {
  const auto cycle = [&](int count) {
    for (int i = 0; i < count; ++i) create(world, 64 << 10)->view(0)[world.rank()] = std::byte{1};
  };
  cycle(3);
  const std::size_t descriptors = count_entries("/proc/self/fd");
  cycle(300);
  EXPECT_EQ(count_entries("/proc/self/fd"), descriptors);
  EXPECT_EQ(count_entries("/dev/shm", "tokenyard"), 0U);
  EXPECT_EQ(count_lines("/proc/self/maps", "tokenyard"), 0U) << "mappings are gone";
});

TEST(MemoryProcesses, HundredsOfCyclesLeaveNothingBehind) { expect_ok(run_processes({.body = "memory.cycles", .ranks = 3})); }

const RegisterBody kDies("memory.dies", [](World& world, const std::string& when) {
  world.barrier();
  if (world.rank() == 1 && when == "before") raise(SIGKILL);
  if (world.rank() == 1) {
    // In the middle of some creation.
    std::thread([] {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      kill(getpid(), SIGKILL);
    }).detach();
    while (true) create(world, 1 << 20);
  }
  const Stopwatch watch;
  const Failure failure = failure_of([&] {
    while (true) create(world, 1 << 20);
  });
  EXPECT_LT(watch.ms(), 5000) << "the deadline is 60 s";
  EXPECT_EQ(failure.kind, FailureKind::peer_lost) << failure.message();
  EXPECT_EQ(failure.phase, Phase::memory);
  EXPECT_EQ(failure.peer, 1);
});

TEST(MemoryProcesses, ARankKilledDuringCreationIsNamedAndLeavesNothing) {
  for (const char* when : {"before", "during"}) {
    expect_ok(run_processes({.body = "memory.dies", .argument = when, .ranks = 3}), 1);
    EXPECT_EQ(count_entries("/dev/shm", "tokenyard"), 0U);
  }
}

const RegisterBody kStops("memory.stops", [](World& world, const std::string&) {
  world.barrier();
  if (world.rank() == 1) raise(SIGSTOP);
  const auto memory = SymmetricMemory::create(world, 4096, Transport::automatic, Deadline::after_ms(700));
  ASSERT_FALSE(memory.has_value());
  EXPECT_EQ(memory.error().kind, FailureKind::timeout);
  EXPECT_EQ(memory.error().peer, 1);
});

TEST(MemoryProcesses, AStoppedRankIsNamedAtTheDeadline) {
  EndStopped end(3000);
  expect_ok(run_processes({.body = "memory.stops", .ranks = 3, .on_start = end.on_start()}), 1);
}

// Rank 0 sleeps on a doorbell in its own memory; rank 1 rings it from another process.
const RegisterBody kDoorbell("memory.doorbell", [](World& world, const std::string&) {
  const Memory memory = create(world, 4096);
  struct Page {
    Doorbell doorbell;
    std::atomic<int> number;
  };
  const auto page = [&](int rank) { return reinterpret_cast<Page*>(memory->view(rank)); };
  for (int round = 1; round <= 2000; ++round) {
    const int turn = round % 2;
    if (world.rank() == turn) {
      page(1 - turn)->number.store(round, std::memory_order_release);
      ring(page(1 - turn)->doorbell);
    } else {
      Page& mine = *page(world.rank());
      const Stopwatch watch;
      ASSERT_TRUE(wait_on(
          mine.doorbell, [&] { return mine.number.load(std::memory_order_acquire) >= round; }, [&] { return watch.ms() > 20'000; }));
    }
  }
  world.barrier();
});

TEST(MemoryProcesses, DoorbellsRingAcrossProcesses) { expect_ok(run_processes({.body = "memory.doorbell", .ranks = 2})); }

}  // namespace
}  // namespace tokenyard::world_test
