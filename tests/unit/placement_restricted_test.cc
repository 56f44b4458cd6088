// What is left of a placement when ranks are lost.

#include <gtest/gtest.h>

#include "expect_usage_error.h"
#include "placement/table.h"
#include "tokenyard/placement.h"

namespace tokenyard {
namespace {

using testing::expect_usage_error;

TEST(PlacementRestricted, SurvivorsAreRenumberedInOrder) {
  const Placement whole = Placement::uniform(6, 3);
  const Placement left = whole.restricted_to(std::vector<int>{0, 2});
  EXPECT_EQ(left.ranks(), 2);
  EXPECT_EQ(left.num_experts(), 6);
  EXPECT_EQ(std::vector<int>(left.local_experts(0).begin(), left.local_experts(0).end()), (std::vector<int>{0, 1}));
  EXPECT_EQ(std::vector<int>(left.local_experts(1).begin(), left.local_experts(1).end()), (std::vector<int>{4, 5}));
  EXPECT_TRUE(left.replicas(2).empty());
  EXPECT_NE(left.hash(), whole.hash());
}

TEST(PlacementRestricted, LivingReplicasTakeOver) {
  const Placement whole = Placement::custom(3, {{{{0}, 3}, {{1}, 1}}, {{{1}, 1}, {{2}, 2}}});
  const Placement left = whole.restricted_to(std::vector<int>{1, 2});
  for (std::int64_t token = 0; token < 64; ++token) {
    EXPECT_EQ(left.replica_for(0, 0, token), 0);
    EXPECT_EQ(left.replicas(0)[0].shard_ranks, std::vector<int>{0});
  }
  EXPECT_EQ(left.replicas(1).size(), 2U);
}

TEST(PlacementRestricted, AReplicaThatLostAShardGoes) {
  const Placement left = Placement::tensor_parallel(4, 2, 2).restricted_to(std::vector<int>{0, 2, 3});
  EXPECT_TRUE(left.replicas(0).empty());
  EXPECT_TRUE(left.local_experts(0).empty());
  EXPECT_EQ(left.replicas(2)[0].shard_ranks, (std::vector<int>{1, 2}));
}

TEST(PlacementRestricted, AnOrphanBesideReplicatedExpertsHasNoInstance) {
  const Placement left = Placement::custom(3, {{{{0}, 1}, {{1}, 1}}, {{{2}, 1}}}).restricted_to(std::vector<int>{0, 1});
  const placement_internal::TableView view = left.table().view();
  for (std::uint32_t token = 0; token < 32; ++token) {
    EXPECT_EQ(*view.shards_of(1, view.replica_for(1, 0, token)), placement_internal::kNoInstance);
  }
}

TEST(PlacementRestricted, RefusesUnknownAndRepeatedRanks) {
  const Placement whole = Placement::uniform(4, 2);
  expect_usage_error([&] { whole.restricted_to(std::vector<int>{0, 2}); }, {"2"});
  expect_usage_error([&] { whole.restricted_to(std::vector<int>{1, 1}); }, {"1", "ascending"});
}

}  // namespace
}  // namespace tokenyard
