#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "multirank/collective_check.h"
#include "multirank/exchange_processes.h"
#include "tokenyard/collective.h"
#include "tokenyard/launch.h"

namespace tokenyard::collective_test {
namespace {

using Counts = std::vector<std::int64_t>;

class CollectiveDirect : public testing::TestWithParam<int> {};

std::string ranks_name(const testing::TestParamInfo<int>& info) { return std::to_string(info.param) + "_ranks"; }
INSTANTIATE_TEST_SUITE_P(Ranks, CollectiveDirect, testing::Values(1, 2, 3, 4, 5, 8), ranks_name);

TEST_P(CollectiveDirect, RandomCallsAsThreads) {
  const std::uint64_t seed = test_seed();
  run_ranks(GetParam(), [&](World& world) {
    // The default staging takes every call in one round, the smallest in many, wrapping the slots at odd places.
    for (const std::int64_t staging_bytes : {std::int64_t{4} << 20, std::int64_t{4096}, std::int64_t{5000}}) {
      const auto collectives = Collectives::create(world, {.staging_bytes = staging_bytes});
      EXPECT_EQ(collectives->transport(), Transport::inproc);
      EXPECT_EQ(collectives->world().rank(), world.rank());
      check_collectives(*collectives, {.seed = seed, .rounds = 15});
    }
  });
}

void random_calls(World& world, const std::string& seed) {
  for (const std::int64_t staging_bytes : {std::int64_t{4} << 20, std::int64_t{4096}}) {
    const auto collectives = Collectives::create(world, {.staging_bytes = staging_bytes});
    EXPECT_EQ(collectives->transport(), Transport::shm);
    check_collectives(*collectives, {.seed = std::stoull(seed), .rounds = 10});
  }
}
const exchange_test::RegisterBody kRandomCalls("collective_random_calls", random_calls);

TEST_P(CollectiveDirect, RandomCallsAsProcesses) {
  const auto exits =
      exchange_test::run_processes({.body = "collective_random_calls", .argument = std::to_string(test_seed()), .ranks = GetParam()});
  for (const RankExit& exit : exits) EXPECT_EQ(exit.exit_code, 0) << "rank " << exit.rank;
}

TEST(CollectiveTransfers, FarLargerThanStaging) {
  run_ranks(3, [](World& world) {
    const auto collectives = Collectives::create(world, {.staging_bytes = 64 << 10});
    check_collectives(*collectives, {.seed = 7, .rounds = 2, .max_rows = 600, .max_elements = 4000});
  });
}

// A rank may be several calls ahead of one that has nothing to do with them; nothing is overwritten meanwhile.
TEST(CollectiveTransfers, RanksOfDifferentPace) {
  run_ranks(4, [](World& world) {
    const auto collectives = Collectives::create(world, {.staging_bytes = 4096});
    for (int call = 0; call < 50; ++call) {
      if (call % 4 == world.rank()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      const std::vector<std::int64_t> mine(700, 1000 * call + world.rank());
      std::vector<std::int64_t> all(4 * 700);
      collectives->all_gather_v({mine.data(), Dtype::int64, {700}}, Counts{700, 700, 700, 700}, {all.data(), Dtype::int64, {2800}});
      for (int i = 0; i < 2800; ++i) ASSERT_EQ(all[i], 1000 * call + i / 700) << "call " << call << ", element " << i;
    }
  });
}

TEST(CollectiveTransfers, BarrierHoldsEverybody) {
  std::atomic<int> arrived{0};
  run_ranks(5, [&](World& world) {
    const auto collectives = Collectives::create(world);
    for (int round = 1; round <= 20; ++round) {
      if (round % 5 == world.rank()) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      arrived.fetch_add(1);
      collectives->barrier();
      EXPECT_GE(arrived.load(), 5 * round);
    }
  });
}

TEST(CollectiveTransfers, SubWorldsAndSeveralObjectsDoNotMix) {
  run_ranks(4, [](World& world) {
    const auto whole = Collectives::create(world, {.staging_bytes = 4096});
    const World pair = *world.split(world.rank() % 2, world.rank());
    const auto half = Collectives::create(pair, {.staging_bytes = 4096});
    for (std::uint64_t seed = 0; seed < 3; ++seed) {
      check_collectives(*whole, {.seed = seed, .rounds = 2});
      check_collectives(*half, {.seed = seed + 10 * (world.rank() % 2), .rounds = 2});
    }
  });
}

TEST(CollectiveTransfers, OwnRowsMayLieInPlace) {
  run_ranks(3, [](World& world) {
    const auto collectives = Collectives::create(world);
    Counts sent{2, 2, 2}, received{2, 2, 2};
    sent[world.rank()] = 0;
    const std::vector<std::int32_t> in(4, world.rank());
    std::vector<std::int32_t> out(6, -5);
    collectives->all_to_all_v({in.data(), Dtype::int32, {4}}, sent, {out.data(), Dtype::int32, {6}}, received);
    for (int i = 0; i < 6; ++i) EXPECT_EQ(out[i], i / 2 == world.rank() ? -5 : i / 2);
  });
}

TEST(CollectiveTransfers, SumsStartAtPositiveZeroAndRoundOnce) {
  run_ranks(3, [](World& world) {
    const auto collectives = Collectives::create(world);
    // Column 0: -0 - 0 - 0 is +0, since the sum starts there. Column 1: 1 + 2^-8 + 2^-8 is 1 + 2^-7 when rounded once to
    // bfloat16; rounded after every addition it would stay 1.
    const std::uint16_t row[] = {float_to_bfloat16(-0.0F), float_to_bfloat16(world.rank() == 0 ? 1.0F : 0.00390625F)};
    std::uint16_t sum[] = {0xffff, 0xffff};
    const bool mine = world.rank() == 1;
    collectives->reduce_scatter_v({row, Dtype::bfloat16, {1, 2}}, Counts{0, 1, 0}, {sum, Dtype::bfloat16, {mine ? 1 : 0, 2}});
    EXPECT_EQ(sum[0], mine ? 0 : 0xffff);
    EXPECT_EQ(sum[1], mine ? float_to_bfloat16(1.0078125F) : 0xffff);
  });
}

}  // namespace
}  // namespace tokenyard::collective_test
