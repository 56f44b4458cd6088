// Memory of GPUs where there are none: every rank learns why. With GPUs, tests/device has its tests.

#include <gtest/gtest.h>

#include "memory/cuda_peer.h"
#include "tokenyard/error.h"
#include "tokenyard/topo.h"
#include "unit/expect_usage_error.h"

namespace tokenyard {
namespace {

TEST(MemoryCudaPeer, WithoutGpusEveryRankLearnsWhy) {
  if (!gpu_topology().gpus.empty()) GTEST_SKIP() << "this machine has GPUs";
  run_ranks(3, [](World& world) {
    const auto memory = CudaPeerMemory::create(world, 4096, -1, Deadline::after_ms(10'000));
    ASSERT_FALSE(memory.has_value());
    EXPECT_EQ(memory.error().phase, Phase::memory);
    EXPECT_EQ(memory.error().kind, world.rank() == 0 ? FailureKind::system : FailureKind::aborted);
    EXPECT_NE(memory.error().detail.find("CUDA"), std::string::npos) << memory.error().detail;
    world.barrier();
  });
}

TEST(MemoryCudaPeer, IsNotMemoryOfCpusNorAreWindows) {
  for (const Transport transport : {Transport::cuda_peer, Transport::nccl_window}) {
    run_ranks(2, [&](World& world) {
      testing::expect_usage_error([&] { static_cast<void>(SymmetricMemory::create(world, 100, transport, Deadline::after_ms(1000))); },
                                  {"transport " + std::string(name(transport)) + " is memory of GPUs", "shm or automatic on CPUs"});
    });
  }
}

}  // namespace
}  // namespace tokenyard
