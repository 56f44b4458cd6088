// Each fault of a placement is refused with the values at fault, the expectation and a remedy.

#include <gtest/gtest.h>

#include <limits>

#include "tokenyard/placement.h"
#include "unit/expect_usage_error.h"

namespace tokenyard {
namespace {

using testing::expect_usage_error;

TEST(PlacementErrors, Sizes) {
  expect_usage_error([] { Placement::uniform(0, 2); }, {"num_experts = 0", "1..65536"});
  expect_usage_error([] { Placement::uniform(-3, 2); }, {"num_experts = -3"});
  expect_usage_error([] { Placement::uniform(65537, 2); }, {"num_experts = 65537", "1..65536"});
  expect_usage_error([] { Placement::uniform(4, 0); }, {"ranks = 0", "1..65535"});
  expect_usage_error([] { Placement::uniform(4, 65536); }, {"ranks = 65536", "1..65535"});
  expect_usage_error([] { Placement::uniform(65536, 1); }, {"rank 0 holds 65536 experts", "65535", "more ranks"});
  expect_usage_error([] { Placement::custom(2, {}); }, {"num_experts = 0"});
}

TEST(PlacementErrors, RequiredEqualWindows) {
  expect_usage_error([] { Placement::uniform(7, 2, {.require_equal_windows = true}); },
                     {"num_experts = 7", "ranks = 2", "3 or 4 experts", "require_equal_windows"});
}

TEST(PlacementErrors, TensorParallel) {
  expect_usage_error([] { Placement::tensor_parallel(4, 0, 2); }, {"ep = 0", "tp = 2"});
  expect_usage_error([] { Placement::tensor_parallel(4, 2, -1); }, {"tp = -1"});
  expect_usage_error([] { Placement::tensor_parallel(4, 65536, 65536); }, {"65536 x 65536 = 4294967296", "1..65535"});
  expect_usage_error([] { Placement::tensor_parallel(0, 2, 2); }, {"num_experts = 0"});
}

TEST(PlacementErrors, CustomNamesExpertReplicaShardAndRank) {
  expect_usage_error([] { Placement::custom(2, {{{{0}, 1}}, {}}); }, {"expert 1 has no replica"});
  expect_usage_error([] { Placement::custom(2, {{{{0}, 1}, {{}, 1}}}); }, {"expert 0, replica 1 has no shard"});
  expect_usage_error([] { Placement::custom(2, {{{{0, 2}, 1}}}); }, {"expert 0, replica 0, shard 1: rank = 2", "ranks = 2", "0..1"});
  expect_usage_error([] { Placement::custom(2, {{{{-1}, 1}}}); }, {"rank = -1"});
  expect_usage_error([] { Placement::custom(2, {{{{0}, 0}}}); }, {"expert 0, replica 0: share = 0", "1..65535"});
  expect_usage_error([] { Placement::custom(2, {{{{0}, 65536}}}); }, {"share = 65536", "1..65535"});
}

TEST(PlacementErrors, OneInstanceOfAnExpertPerRank) {
  expect_usage_error(
      [] {
        Placement::custom(2, {{{{0}, 1}}, {{{1, 1}, 1}}});
      },
      {"expert 1: rank 1", "replica 0 shard 0", "replica 0 shard 1", "its own rank"});
  expect_usage_error(
      [] {
        Placement::custom(3, {{{{0, 1}, 1}, {{2, 0}, 1}}});
      },
      {"expert 0: rank 0", "replica 0 shard 0", "replica 1 shard 1", "its own rank"});
}

// One expert with many replicas and another with many shards would multiply in the dense table.
TEST(PlacementErrors, TableSizeIsBounded) {
  std::vector<std::vector<Replica>> replicas(64, {Replica{{0}, 1}});
  for (int rank = 1; rank < 1000; ++rank) replicas[0].push_back({{rank}, 1});
  for (int rank = 1; rank < 1000; ++rank) replicas[1][0].shard_ranks.push_back(rank);
  expect_usage_error([&] { Placement::custom(1000, replicas); }, {"64 experts x 1000 replicas x 1000 shards = 64000000", "16777216"});
}

TEST(PlacementErrors, Accessors) {
  const Placement placement = Placement::uniform(4, 2);
  expect_usage_error([&] { placement.local_experts(2); }, {"rank = 2", "0..1"});
  expect_usage_error([&] { placement.replicas(-1); }, {"expert = -1", "0..3"});
  expect_usage_error([&] { placement.replica_for(4, 0, 0); }, {"expert = 4", "0..3"});
  expect_usage_error([&] { placement.replica_for(0, 2, 0); }, {"source_rank = 2", "0..1"});
}

TEST(PlacementErrors, Replicated) {
  const std::vector<double> load = {1, 2, 3};
  expect_usage_error([&] { Placement::replicated(4, 2, load, 0); }, {"load has 3 entries", "num_experts = 4"});
  expect_usage_error([&] { Placement::replicated(3, 2, load, -1); }, {"redundant = -1", "0..3"});
  expect_usage_error([&] { Placement::replicated(3, 2, load, 4); }, {"redundant = 4", "3 experts on 2 ranks", "0..3"});
  expect_usage_error([&] { Placement::replicated(3, 4, load, 1, {.ranks_per_node = 3}); }, {"ranks_per_node = 3", "ranks = 4"});
  expect_usage_error([&] { Placement::replicated(3, 4, load, 1, {.ranks_per_node = -1}); }, {"ranks_per_node = -1"});
  expect_usage_error([&] { Placement::replicated(3, 0, load, 1); }, {"ranks = 0"});
  for (const double bad : {-0.5, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    expect_usage_error([&] { Placement::replicated(3, 2, std::vector<double>{1, bad, 1}, 0); }, {"load[1] = ", "finite and not negative"});
  }
}

TEST(PlacementErrors, Moves) {
  expect_usage_error([] { moves(Placement::uniform(4, 2), Placement::uniform(5, 2)); }, {"4 and 5 experts"});
  expect_usage_error([] { moves(Placement::uniform(4, 4), Placement::tensor_parallel(4, 2, 2)); },
                     {"expert 0 is cut into 2 shards on rank 0", "cuts it into 1", "reshard"});
  const Placement without_expert_1 = Placement::uniform(2, 2).restricted_to(std::vector<int>{0});
  expect_usage_error([&] { moves(without_expert_1, Placement::uniform(2, 1)); }, {"expert 1 is on no rank", "load its weights"});
}

}  // namespace
}  // namespace tokenyard
