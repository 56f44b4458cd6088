#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "memory/symmetric_memory.h"
#include "tokenyard/error.h"
#include "world/fd.h"

namespace tokenyard {
namespace {

using Memory = std::unique_ptr<SymmetricMemory>;

Memory create(const World& world, std::size_t bytes, Transport transport) {
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

// Rank threads, over either provider: shm works between threads as it does between processes.
class MemorySymmetric : public testing::TestWithParam<Transport> {};
INSTANTIATE_TEST_SUITE_P(Providers, MemorySymmetric, testing::Values(Transport::inproc, Transport::shm),
                         [](const auto& info) { return std::string(name(info.param)); });

TEST_P(MemorySymmetric, EveryRankSeesWhatEveryRankWrites) {
  for (const int size : {1, 2, 3, 8}) {
    run_ranks(size, [&](World& world) {
      const Memory memory = create(world, 3 * 4096, GetParam());
      EXPECT_EQ(memory->transport(), GetParam());
      EXPECT_EQ(memory->bytes(), 3U * 4096);
      for (int rank = 0; rank < size; ++rank) EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory->view(rank)) % 4096, 0U);
      // Each rank writes its own byte into its place of every arena.
      for (int rank = 0; rank < size; ++rank) std::memset(memory->view(rank) + world.rank() * 1000, world.rank() + 1, 1000);
      world.barrier();
      for (int rank = 0; rank < size; ++rank) {
        for (int writer = 0; writer < size; ++writer) {
          EXPECT_EQ(memory->view(rank)[writer * 1000], std::byte(writer + 1));
          EXPECT_EQ(memory->view(rank)[writer * 1000 + 999], std::byte(writer + 1));
        }
      }
      world.barrier();
    });
  }
}

TEST_P(MemorySymmetric, ItStartsZeroFilledAndIsRoundedUpToPages) {
  run_ranks(2, [&](World& world) {
    for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{4096}, std::size_t{4097}, (std::size_t{2} << 20) + 1}) {
      const Memory memory = create(world, bytes, GetParam());
      EXPECT_EQ(memory->bytes(), std::max<std::size_t>((bytes + 4095) / 4096, 1) * 4096);
      for (int rank = 0; rank < 2; ++rank) {
        const std::byte* view = memory->view(rank);
        EXPECT_TRUE(std::all_of(view, view + memory->bytes(), [](std::byte b) { return b == std::byte{0}; }));
      }
      world.barrier();
      std::memset(memory->view(world.rank()), 0xff, memory->bytes());
      world.barrier();
    }
  });
}

TEST_P(MemorySymmetric, ViewsOutliveTheMemoryOfTheirOwner) {
  run_ranks(3, [&](World& world) {
    Memory memory = create(world, 1 << 20, GetParam());
    std::memset(memory->view(world.rank()), world.rank() + 1, memory->bytes());
    world.barrier();
    if (world.rank() == 1) memory.reset();
    world.barrier();
    if (world.rank() == 1) return;
    for (int rank = 0; rank < 3; ++rank) {
      EXPECT_EQ(memory->view(rank)[0], std::byte(rank + 1));
      EXPECT_EQ(memory->view(rank)[memory->bytes() - 1], std::byte(rank + 1));
      memory->view(rank)[5 + world.rank()] = std::byte{99};  // a byte of its own: ranks write at once
    }
  });
}

TEST_P(MemorySymmetric, ArenasOfOneWorldAndOfSubWorldsAreApart) {
  run_ranks(4, [&](World& world) {
    const auto pair = world.split(world.rank() / 2, 0);
    const Memory first = create(world, 4096, GetParam());
    const Memory second = create(world, 4096, GetParam());
    const Memory sub = create(*pair, 4096, GetParam());
    first->view(world.rank())[0] = std::byte(10 + world.rank());
    second->view(world.rank())[0] = std::byte(20 + world.rank());
    sub->view(pair->rank())[0] = std::byte(30 + world.rank());
    world.barrier();
    for (int rank = 0; rank < 4; ++rank) {
      EXPECT_EQ(first->view(rank)[0], std::byte(10 + rank));
      EXPECT_EQ(second->view(rank)[0], std::byte(20 + rank));
    }
    for (int rank = 0; rank < 2; ++rank) EXPECT_EQ(sub->view(rank)[0], std::byte(30 + world.rank() / 2 * 2 + rank));
    world.barrier();
  });
}

TEST_P(MemorySymmetric, AtomicsWorkAcrossRanks) {
  run_ranks(4, [&](World& world) {
    const Memory memory = create(world, 4096, GetParam());
    for (int round = 0; round < 1000; ++round) {
      for (int rank = 0; rank < 4; ++rank) reinterpret_cast<std::atomic<std::uint64_t>*>(memory->view(rank))->fetch_add(1);
    }
    world.barrier();
    EXPECT_EQ(reinterpret_cast<std::atomic<std::uint64_t>*>(memory->view(world.rank()))->load(), 4000U);
    world.barrier();
  });
}

TEST_P(MemorySymmetric, DifferentSizesAreAMismatchThatNamesBoth) {
  run_ranks(3, [&](World& world) {
    const auto memory = SymmetricMemory::create(world, world.rank() == 2 ? 8192 : 4096, GetParam(), Deadline::after_ms(10'000));
    ASSERT_FALSE(memory.has_value());
    EXPECT_EQ(memory.error().kind, FailureKind::mismatch);
    EXPECT_EQ(memory.error().phase, Phase::memory);
    EXPECT_EQ(memory.error().rank, world.rank());
    EXPECT_EQ(memory.error().peer, world.rank() == 2 ? 0 : 2);
    EXPECT_NE(memory.error().detail.find("4096"), std::string::npos) << memory.error().detail;
    EXPECT_NE(memory.error().detail.find("8192"), std::string::npos) << memory.error().detail;
    create(world, 4096, GetParam());
  });
}

TEST_P(MemorySymmetric, WhatTheMachineDoesNotHaveIsRefusedOnAllRanks) {
  run_ranks(2, [&](World& world) {
    for (const std::size_t bytes : {std::size_t{1} << 60, ~std::size_t{0}, ~std::size_t{0} - 4095}) {
      const auto memory = SymmetricMemory::create(world, world.rank() == 1 ? bytes : 4096, GetParam(), Deadline::after_ms(10'000));
      ASSERT_FALSE(memory.has_value());
      EXPECT_EQ(memory.error().kind, world.rank() == 1 ? FailureKind::system : FailureKind::aborted);
      EXPECT_EQ(memory.error().peer, 1);
      EXPECT_NE(memory.error().detail.find(std::to_string(bytes)), std::string::npos) << memory.error().detail;
    }
    create(world, 4096, GetParam());
  });
}

TEST_P(MemorySymmetric, ARankThatDoesNotComeIsNamed) {
  std::atomic<int> given_up{0};
  run_ranks(3, [&](World& world) {
    if (world.rank() != 1) {
      const auto memory = SymmetricMemory::create(world, 4096, GetParam(), Deadline::after_ms(200));
      ASSERT_FALSE(memory.has_value());
      EXPECT_EQ(memory.error().kind, FailureKind::timeout);
      EXPECT_EQ(memory.error().phase, Phase::memory);
      EXPECT_EQ(memory.error().peer, 1);
      ++given_up;
    }
    while (given_up < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  run_ranks(3, [&](World& world) {
    if (world.rank() == 1) return world.leave();
    const auto memory = SymmetricMemory::create(world, 4096, GetParam(), Deadline::after_ms(60'000));
    ASSERT_FALSE(memory.has_value());
    EXPECT_EQ(memory.error().kind, FailureKind::peer_lost);
    EXPECT_EQ(memory.error().peer, 1);
  });
}

TEST_P(MemorySymmetric, HundredsOfCyclesLeaveNothingBehind) {
  const auto cycles = [&](int count) {
    run_ranks(3, [&](World& world) {
      for (int i = 0; i < count; ++i) create(world, 64 << 10, GetParam())->view(0)[world.rank()] = std::byte{1};
    });
  };
  cycles(5);
  const std::size_t descriptors = count_entries("/proc/self/fd");
  const std::size_t mappings = count_lines("/proc/self/maps", "tokenyard");
  cycles(400);
  EXPECT_EQ(count_entries("/proc/self/fd"), descriptors);
  EXPECT_EQ(count_entries("/dev/shm", "tokenyard"), 0U);
  EXPECT_EQ(count_lines("/proc/self/maps", "tokenyard"), mappings);
  EXPECT_EQ(count_lines("/proc/net/unix", "tokenyard-" + std::to_string(getpid()) + "-"), 0U);
}

TEST(MemoryTransports, AutomaticPicksInprocForThreads) {
  run_ranks(2, [](World& world) { EXPECT_EQ(create(world, 100, Transport::automatic)->transport(), Transport::inproc); });
}

TEST(MemoryTransports, WithoutMemoryIsAUsageError) {
  run_ranks(2, [](World& world) { EXPECT_THROW(create(world, 100, Transport::mpi), UsageError); });
}

// Nobody can shrink a peer's arena under it: that would be a SIGBUS there.
TEST(MemoryTransports, SharedFilesAreSealed) {
  int tried = 0;
  run_ranks(2, [&](World& world) {
    const Memory memory = create(world, 8192, Transport::shm);
    if (world.rank() == 0) {
      // The descriptors are closed, but root can open a mapping's file through /proc.
      std::ifstream maps("/proc/self/maps");
      for (std::string line; std::getline(maps, line);) {
        if (line.find("memfd:tokenyard") == std::string::npos) continue;
        const std::string path = "/proc/self/map_files/" + line.substr(0, line.find(' '));
        const world_internal::Fd file(open(path.c_str(), O_RDWR | O_CLOEXEC));
        if (!file) continue;
        ++tried;
        EXPECT_NE(ftruncate(file.get(), 0), 0);
        EXPECT_NE(ftruncate(file.get(), 1 << 20), 0);
      }
    }
    world.barrier();
    EXPECT_EQ(memory->view(1)[8191], std::byte{0});
    world.barrier();
  });
  if (tried == 0) GTEST_SKIP() << "only root may open the files of mappings";
}

}  // namespace
}  // namespace tokenyard
