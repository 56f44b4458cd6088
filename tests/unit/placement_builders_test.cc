// uniform, tensor_parallel and custom: known answers, the table that kernels read, and the invariants of any placement.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <map>
#include <set>

#include "placement/table.h"
#include "tokenyard/placement.h"
#include "unit/placement_gen.h"

namespace tokenyard {
namespace {

using testing::PlacementParts;

std::vector<int> local_experts(const Placement& placement, int rank) {
  const std::span<const int> experts = placement.local_experts(rank);
  return {experts.begin(), experts.end()};
}

std::vector<std::pair<int, int>> where(const Placement& placement, int expert) {
  std::vector<std::pair<int, int>> result;
  for (const Instance& instance : placement.instances()) {
    if (instance.expert == expert) result.emplace_back(instance.rank, instance.local_index);
  }
  return result;
}

using Pairs = std::vector<std::pair<int, int>>;

TEST(PlacementUniform, FirstRanksOwnOneMore) {
  const Placement placement = Placement::uniform(7, 3);
  EXPECT_EQ(local_experts(placement, 0), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(local_experts(placement, 1), (std::vector<int>{3, 4}));
  EXPECT_EQ(local_experts(placement, 2), (std::vector<int>{5, 6}));
  EXPECT_EQ(placement.num_experts(), 7);
  EXPECT_EQ(placement.ranks(), 3);
  EXPECT_EQ(placement.max_local_experts(), 3);
  EXPECT_EQ(placement.max_fanout(), 1);
  EXPECT_EQ(placement.max_replicas(), 1);
}

TEST(PlacementUniform, MoreRanksThanExpertsLeavesEmptyRanks) {
  const Placement placement = Placement::uniform(3, 5);
  for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(local_experts(placement, rank), std::vector<int>{rank});
  EXPECT_TRUE(placement.local_experts(3).empty());
  EXPECT_TRUE(placement.local_experts(4).empty());
}

TEST(PlacementUniform, EveryShapeIsContiguousCompleteAndEven) {
  for (int experts = 1; experts <= 40; ++experts) {
    for (int ranks = 1; ranks <= 40; ++ranks) {
      const Placement placement = Placement::uniform(experts, ranks);
      int next = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        const auto window = placement.local_experts(rank);
        EXPECT_EQ(std::ssize(window), experts / ranks + (rank < experts % ranks ? 1 : 0)) << experts << " on " << ranks;
        for (const int expert : window) EXPECT_EQ(expert, next++);
      }
      EXPECT_EQ(next, experts);
    }
  }
}

TEST(PlacementUniform, EqualWindowsMayBeRequired) {
  EXPECT_EQ(Placement::uniform(8, 4, {.require_equal_windows = true}).hash(), Placement::uniform(8, 4).hash());
}

TEST(PlacementUniform, LargestSizes) {
  const Placement placement = Placement::uniform(65536, 65535);
  EXPECT_EQ(local_experts(placement, 0), (std::vector<int>{0, 1}));
  EXPECT_EQ(local_experts(placement, 65534), std::vector<int>{65535});
}

TEST(PlacementTensorParallel, KnownAnswer) {
  const Placement placement = Placement::tensor_parallel(4, 2, 2);
  EXPECT_EQ(placement.ranks(), 4);
  EXPECT_EQ(placement.max_fanout(), 2);
  EXPECT_EQ(where(placement, 0), (Pairs{{0, 0}, {1, 0}}));
  EXPECT_EQ(where(placement, 1), (Pairs{{0, 1}, {1, 1}}));
  EXPECT_EQ(where(placement, 2), (Pairs{{2, 0}, {3, 0}}));
  EXPECT_EQ(where(placement, 3), (Pairs{{2, 1}, {3, 1}}));
}

TEST(PlacementTensorParallel, UnevenWindows) {
  const Placement placement = Placement::tensor_parallel(5, 2, 3);
  EXPECT_EQ(where(placement, 2), (Pairs{{0, 2}, {1, 2}, {2, 2}}));
  EXPECT_EQ(where(placement, 3), (Pairs{{3, 0}, {4, 0}, {5, 0}}));
  EXPECT_EQ(placement.max_local_experts(), 3);
}

TEST(PlacementTensorParallel, OneShardIsUniform) { EXPECT_EQ(Placement::tensor_parallel(9, 4, 1).hash(), Placement::uniform(9, 4).hash()); }

TEST(PlacementCustom, MixedReplicasAndShards) {
  const Placement placement = Placement::custom(4, {{{{2, 0}, 1}, {{3}, 5}}, {{{0}, 1}}});
  EXPECT_EQ(placement.max_replicas(), 2);
  EXPECT_EQ(placement.max_fanout(), 2);
  const std::vector<Instance> instances = placement.instances();
  ASSERT_EQ(instances.size(), 4U);
  const auto fields = [](const Instance& i) { return std::vector<int>{i.expert, i.replica, i.shard, i.rank, i.local_index}; };
  EXPECT_EQ(fields(instances[0]), (std::vector<int>{0, 0, 0, 2, 0}));
  EXPECT_EQ(fields(instances[1]), (std::vector<int>{0, 0, 1, 0, 0}));
  EXPECT_EQ(fields(instances[2]), (std::vector<int>{0, 1, 0, 3, 0}));
  EXPECT_EQ(fields(instances[3]), (std::vector<int>{1, 0, 0, 0, 1}));
  EXPECT_TRUE(placement.local_experts(1).empty());
}

TEST(PlacementTable, DenseFormIsPadded) {
  using placement_internal::kNoInstance;
  using placement_internal::pack_instance;
  const Placement placement = Placement::custom(4, {{{{2, 0}, 2}, {{3}, 5}}, {{{0}, 9}}});
  const placement_internal::Table& table = placement.table();
  EXPECT_EQ(table.instances, (std::vector<std::uint32_t>{pack_instance(2, 0), pack_instance(0, 0), pack_instance(3, 0), kNoInstance,
                                                         pack_instance(0, 1), kNoInstance, kNoInstance, kNoInstance}));
  EXPECT_EQ(table.share_ends, (std::vector<std::uint32_t>{2, 7, 9, 9}));
}

TEST(PlacementTable, SumOfSharesFitsItsWord) {
  std::vector<Replica> replicas(65535, Replica{{0}, 65535});
  for (int rank = 0; rank < 65535; ++rank) replicas[rank].shard_ranks[0] = rank;
  const Placement placement = Placement::custom(65535, {replicas});
  EXPECT_EQ(placement.table().share_ends.back(), 65535U * 65535U);
}

// Whatever the replicas are, all views of a placement tell the same story.
RC_GTEST_PROP(PlacementTable, AgreesWithReplicas, ()) {
  const PlacementParts parts = *testing::any_parts();
  const Placement placement = parts.build();
  const placement_internal::TableView view = placement.table().view();
  std::map<int, std::vector<int>> experts_of_rank;
  std::size_t count = 0;
  for (int expert = 0; expert < placement.num_experts(); ++expert) {
    const auto replicas = placement.replicas(expert);
    RC_ASSERT(replicas.size() == parts.replicas[expert].size());
    std::uint32_t end = 0;
    for (int replica = 0; replica < view.max_replicas; ++replica) {
      const bool exists = replica < std::ssize(replicas);
      if (exists) RC_ASSERT(replicas[replica].shard_ranks == parts.replicas[expert][replica].shard_ranks);
      if (exists) end += parts.replicas[expert][replica].share;
      RC_ASSERT(view.share_ends[expert * view.max_replicas + replica] == end);
      for (int shard = 0; shard < view.max_fanout; ++shard) {
        const std::uint32_t packed = view.shards_of(expert, replica)[shard];
        if (!exists || shard >= std::ssize(replicas[replica].shard_ranks)) {
          RC_ASSERT(packed == placement_internal::kNoInstance);
          continue;
        }
        ++count;
        const int rank = placement_internal::instance_rank(packed);
        RC_ASSERT(rank == replicas[replica].shard_ranks[shard]);
        RC_ASSERT(placement.local_experts(rank)[placement_internal::instance_local(packed)] == expert);
        experts_of_rank[rank].push_back(expert);
      }
    }
  }
  RC_ASSERT(placement.instances().size() == count);
  for (int rank = 0; rank < placement.ranks(); ++rank) {
    RC_ASSERT(local_experts(placement, rank) == experts_of_rank[rank]);  // ascending, once each
    RC_ASSERT(std::set<int>(experts_of_rank[rank].begin(), experts_of_rank[rank].end()).size() == experts_of_rank[rank].size());
  }
}

}  // namespace
}  // namespace tokenyard
