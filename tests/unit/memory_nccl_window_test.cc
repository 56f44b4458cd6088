// Windows of NCCL where there are none: every rank learns why. With GPUs and NCCL, tests/device has their tests.

#include "memory/nccl_window.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tokenyard/error.h"
#include "tokenyard/topo.h"

namespace tokenyard {
namespace {

Backend windows() {
  const auto all = backends();
  return *std::find_if(all.begin(), all.end(), [](const Backend& backend) { return backend.name == "nccl_window"; });
}

TEST(MemoryNcclWindow, TopoSaysWhyThereAreNoneAndWhatToDo) {
  const Backend found = windows();
  EXPECT_EQ(found.kind, "memory");
  if (found.availability == Availability::available) {
    EXPECT_FALSE(found.version.empty());
    return;
  }
  EXPECT_FALSE(found.reason.empty());
  const bool is_built = found.availability != Availability::not_built;
  EXPECT_EQ(found.remedy.find("-DTY_NCCL=ON") == std::string::npos, is_built) << found.remedy;
}

TEST(MemoryNcclWindow, WithoutItEveryRankLearnsWhy) {
  const Backend found = windows();
  if (found.availability == Availability::available) GTEST_SKIP() << "this machine has windows";
  run_ranks(3, [&](World& world) {
    if (found.availability == Availability::not_usable) {
      EXPECT_THROW(static_cast<void>(create_nccl_window(world, 4096, {.timeout_ms = 10'000})), UsageError);
      return;
    }
    const auto memory = create_nccl_window(world, 4096, {.timeout_ms = 10'000});
    ASSERT_FALSE(memory.has_value());
    EXPECT_EQ(memory.error().phase, Phase::memory);
    EXPECT_EQ(memory.error().kind, world.rank() == 0 ? FailureKind::system : FailureKind::aborted);
    EXPECT_NE(memory.error().detail.find("-DTY_NCCL=ON"), std::string::npos) << memory.error().detail;
    EXPECT_NE(memory.error().detail.find("cuda_peer"), std::string::npos) << memory.error().detail;
    world.barrier();
  });
}

}  // namespace
}  // namespace tokenyard
