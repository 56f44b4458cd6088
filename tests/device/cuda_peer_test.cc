// Memory between GPUs: of rank threads and of rank processes, on one GPU and on several.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <vector>

#include "device/gpus.h"
#include "device/pattern_run.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "memory/cuda_peer.h"
#include "multirank/exchange_processes.h"
#include "multirank/world_failures.h"

namespace tokenyard::device_test {
namespace {

using exchange_test::RegisterBody;
using exchange_test::run_processes;
using Memory = std::unique_ptr<SymmetricMemory>;

constexpr std::size_t kArenaBytes = std::size_t{3} << 20;
constexpr std::size_t kGranularity = std::size_t{2} << 20;

Memory create(const World& world, std::size_t bytes, CudaSharing sharing = CudaSharing::automatic) {
  return value_or_throw(CudaPeerMemory::create(world, bytes, use_gpu_of(world.rank()), Deadline::after_ms(world.timeout_ms()), sharing));
}

void run_patterns(World& world, CudaSharing sharing, std::uint64_t rounds) {
  const Memory memory = create(world, kArenaBytes, sharing);
  EXPECT_EQ(memory->transport(), Transport::cuda_peer);
  EXPECT_EQ(memory->bytes(), 2 * kGranularity);
  exchange_patterns(world, *memory, rounds);
}

class CudaPeer : public OnGpu {};

TEST_F(CudaPeer, KernelsOfRankThreadsWriteEachOthersArenas) {
  for (const int ranks : {1, 2, 4, 8}) {
    run_ranks(ranks, [](World& world) { run_patterns(world, CudaSharing::automatic, 20); });
  }
}

TEST_F(CudaPeer, PlainMemoryOfRankThreadsServes) {
  for (const int ranks : {1, 2, 4}) {
    run_ranks(ranks, [](World& world) { run_patterns(world, CudaSharing::ipc_handles, 5); });
  }
}

TEST_F(CudaPeer, ThreadsOnOneGpuOfSeveral) {
  if (gpu_count() < 2) GTEST_SKIP() << "one GPU: the other tests do this";
  run_ranks(3, [](World& world) {
    const auto memory = CudaPeerMemory::create(world, kArenaBytes, gpu_count() - 1, Deadline::after_ms(world.timeout_ms()));
    ASSERT_TRUE(memory.has_value()) << memory.error().message();
    cudaPointerAttributes attributes = {};
    cuda_check(cudaPointerGetAttributes(&attributes, (*memory)->view(0)), "cudaPointerGetAttributes");
    EXPECT_EQ(attributes.device, gpu_count() - 1);
    world.barrier();
  });
}

const RegisterBody kPattern("cuda.pattern", [](World& world, const std::string& sharing) {
  // Processes on one GPU take turns, so rounds are slow there.
  run_patterns(world, sharing == "ipc" ? CudaSharing::ipc_handles : CudaSharing::automatic, world.size() > gpu_count() ? 2 : 20);
});

void expect_ok(const std::vector<RankExit>& exits) {
  for (const RankExit& exit : exits) EXPECT_EQ(exit.exit_code, 0) << "rank " << exit.rank;
}

TEST_F(CudaPeer, ProcessesPassDescriptors) {
  for (const int ranks : {1, 2}) expect_ok(run_processes({.body = "cuda.pattern", .argument = "fd", .ranks = ranks}));
  if (gpu_count() > 2) expect_ok(run_processes({.body = "cuda.pattern", .argument = "fd", .ranks = gpu_count()}));
}

TEST_F(CudaPeer, ProcessesPassIpcHandles) { expect_ok(run_processes({.body = "cuda.pattern", .argument = "ipc", .ranks = 2})); }

const RegisterBody kOutlive("cuda.outlive", [](World& world, const std::string&) {
  Memory memory = create(world, kArenaBytes);
  fill(memory->view(world.rank()), world.rank() + 1, memory->bytes());
  world.barrier();
  if (world.rank() == 1) return;
  EXPECT_TRUE(world_test::comes_true(20'000, [&] { return !world.alive(1); }));
  for (int rank = 0; rank < 2; ++rank) EXPECT_TRUE(all_are(fetch(memory->view(rank), memory->bytes()), rank + 1)) << rank;
  fill(memory->view(1), 77, memory->bytes());
});

TEST_F(CudaPeer, AViewOutlivesItsOwnersProcess) { expect_ok(run_processes({.body = "cuda.outlive", .ranks = 2})); }

TEST_F(CudaPeer, AViewOutlivesItsOwnersMemory) {
  run_ranks(2, [](World& world) {
    Memory memory = create(world, kArenaBytes);
    fill(memory->view(world.rank()), world.rank() + 1, memory->bytes());
    world.barrier();
    if (world.rank() == 1) memory.reset();
    world.barrier();
    if (world.rank() == 0) {
      EXPECT_TRUE(all_are(fetch(memory->view(1), kArenaBytes), 2));
    }
    world.barrier();
  });
}

TEST_F(CudaPeer, DifferentSizesAreAMismatchThatNamesBoth) {
  run_ranks(2, [](World& world) {
    const auto memory =
        CudaPeerMemory::create(world, world.rank() == 0 ? 1 : kArenaBytes, use_gpu_of(world.rank()), Deadline::after_ms(10'000));
    ASSERT_FALSE(memory.has_value());
    EXPECT_EQ(memory.error().kind, FailureKind::mismatch);
    EXPECT_NE(memory.error().detail.find(std::to_string(kGranularity)), std::string::npos) << memory.error().detail;
    EXPECT_NE(memory.error().detail.find(std::to_string(2 * kGranularity)), std::string::npos) << memory.error().detail;
    create(world, 1);
  });
}

TEST_F(CudaPeer, WhatAGpuDoesNotHaveIsRefusedOnAllRanks) {
  run_ranks(2, [](World& world) {
    const int gpu = use_gpu_of(world.rank());
    const auto refused = [&](std::size_t bytes, int device) {
      const auto memory = CudaPeerMemory::create(world, bytes, device, Deadline::after_ms(10'000));
      ASSERT_FALSE(memory.has_value());
      EXPECT_EQ(memory.error().kind, world.rank() == 1 ? FailureKind::system : FailureKind::aborted);
      EXPECT_EQ(memory.error().peer, 1);
    };
    refused(world.rank() == 1 ? std::size_t{1} << 60 : kArenaBytes, gpu);
    refused(kArenaBytes, world.rank() == 1 ? gpu_count() : gpu);
    create(world, kArenaBytes);
  });
}

TEST_F(CudaPeer, MoreThanIsFreeIsRefusedOnAllRanks) {
  run_ranks(2, [](World& world) {
    use_gpu_of(world.rank());
    std::size_t free = 0;
    std::size_t total = 0;
    cuda_check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    // Passes the look at the whole GPU, and fails when it is made: first as virtual memory, then as plain.
    const DeviceBuffer taken = value_or_throw(make_device_buffer(world.rank() % gpu_count(), std::size_t{64} << 20));
    const auto memory = CudaPeerMemory::create(world, total / kGranularity * kGranularity, -1, Deadline::after_ms(30'000));
    ASSERT_FALSE(memory.has_value());
    EXPECT_NE(memory.error().detail.find("are free there"), std::string::npos) << memory.error().detail;
    create(world, kArenaBytes);
  });
}

TEST_F(CudaPeer, ARankThatDoesNotComeIsNamed) {
  std::atomic<int> given_up{0};
  run_ranks(3, [&](World& world) {
    if (world.rank() != 1) {
      const auto memory = CudaPeerMemory::create(world, kArenaBytes, use_gpu_of(world.rank()), Deadline::after_ms(1000));
      ASSERT_FALSE(memory.has_value());
      EXPECT_EQ(memory.error().kind, FailureKind::timeout);
      EXPECT_EQ(memory.error().peer, 1);
      ++given_up;
    }
    while (given_up < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
}

void expect_nothing_left(World& world) {
  const auto cycle = [&](int count) {
    for (int i = 0; i < count; ++i) fill(create(world, kArenaBytes)->view(0), 1, 100);
  };
  cycle(3);
  free_on_all_gpus();  // makes a context on every GPU, and takes memory there: not between another rank's two looks
  world.barrier();
  const std::size_t descriptors = open_descriptors();
  const std::size_t free = free_on_all_gpus();
  world.barrier();
  cycle(100);
  world.barrier();
  // In process other ranks' threads come and go; a leak would be hundreds.
  EXPECT_LT(open_descriptors(), descriptors + 20);
  EXPECT_GT(free_on_all_gpus() + 50 * kGranularity, free);
  world.barrier();
}

const RegisterBody kCycles("cuda.cycles", [](World& world, const std::string&) { expect_nothing_left(world); });

TEST_F(CudaPeer, HundredsOfCyclesLeaveNothingBehind) {
  run_ranks(2, expect_nothing_left);
  expect_ok(run_processes({.body = "cuda.cycles", .ranks = 2}));
}

}  // namespace
}  // namespace tokenyard::device_test
