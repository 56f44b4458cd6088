// The moves between two placements carry exactly the weights that the new one needs and its ranks lack.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <set>
#include <tuple>

#include "unit/placement_gen.h"

namespace tokenyard {
namespace {

using testing::PlacementParts;
using Holding = std::tuple<int, int, int>;  // rank, expert, shard

std::set<Holding> holdings(const Placement& placement) {
  std::set<Holding> result;
  for (const Instance& i : placement.instances()) result.emplace(i.rank, i.expert, i.shard);
  return result;
}

TEST(PlacementMoves, NoneBetweenEqualPlacements) {
  const Placement placement = Placement::tensor_parallel(5, 2, 2);
  EXPECT_TRUE(moves(placement, placement).empty());
}

TEST(PlacementMoves, KnownAnswer) {
  // Expert 0 gains a replica on rank 3; of its holders 0 and 2 the nearer one sends. Expert 1 goes from rank 1 to rank 0.
  const Placement from = Placement::custom(4, {{{{0}, 1}, {{2}, 1}}, {{{1}, 1}}});
  const Placement to = Placement::custom(4, {{{{2}, 1}, {{3}, 1}}, {{{0}, 1}}});
  EXPECT_EQ(moves(from, to), (std::vector<Move>{{0, 0, 2, 3}, {1, 0, 1, 0}}));
}

TEST(PlacementMoves, TiesGoToTheLowerRank) {
  const Placement from = Placement::custom(3, {{{{2}, 1}, {{0}, 1}}});
  const Placement to = Placement::custom(3, {{{{1}, 1}}});
  EXPECT_EQ(moves(from, to), (std::vector<Move>{{0, 0, 0, 1}}));
}

TEST(PlacementMoves, AnotherShardOfTheSameExpertIsAMove) {
  const Placement from = Placement::custom(2, {{{{0, 1}, 1}}});
  const Placement to = Placement::custom(2, {{{{1, 0}, 1}}});
  EXPECT_EQ(moves(from, to), (std::vector<Move>{{0, 1, 1, 0}, {0, 0, 0, 1}}));
}

TEST(PlacementMoves, SharesMoveNothing) {
  EXPECT_TRUE(moves(Placement::custom(2, {{{{0}, 1}, {{1}, 1}}}), Placement::custom(2, {{{{1}, 9}, {{0}, 2}}})).empty());
}

TEST(PlacementMoves, MayGrowTheRanks) {
  EXPECT_EQ(moves(Placement::uniform(2, 1), Placement::uniform(2, 2)), (std::vector<Move>{{1, 0, 0, 1}}));
}

RC_GTEST_PROP(PlacementMoves, TurnOldIntoNew, ()) {
  const int experts = *rc::gen::inRange(1, 12);
  const int ranks = *rc::gen::inRange(1, 9);
  const Placement from = testing::random_parts(*rc::gen::arbitrary<std::uint64_t>(), experts, ranks, 1).build();
  const Placement to = testing::random_parts(*rc::gen::arbitrary<std::uint64_t>(), experts, ranks, 1).build();
  const std::set<Holding> before = holdings(from);
  std::set<Holding> after = before;
  for (const Move& move : moves(from, to)) {
    RC_ASSERT(before.count({move.from_rank, move.expert, move.shard}) == 1U);      // the sender has it
    RC_ASSERT(after.emplace(move.to_rank, move.expert, move.shard).second);        // nothing travels twice or in vain
    RC_ASSERT(holdings(to).count({move.to_rank, move.expert, move.shard}) == 1U);  // only what is wanted travels
  }
  for (const Holding& holding : holdings(to)) RC_ASSERT(after.count(holding) == 1U);
}

TEST(PlacementMoves, TurnOldIntoNewWithShards) {
  std::vector<std::vector<Replica>> from(6);
  std::vector<std::vector<Replica>> to(6);
  for (int expert = 0; expert < 6; ++expert) {
    from[expert] = {{{expert % 4, (expert + 1) % 4}, 1}};
    to[expert] = {{{(expert + 2) % 4, expert % 4}, 1}, {{(expert + 3) % 4, (expert + 1) % 4}, 1}};
  }
  const Placement old_placement = Placement::custom(4, from);
  const Placement new_placement = Placement::custom(4, to);
  std::set<Holding> after = holdings(old_placement);
  for (const Move& move : moves(old_placement, new_placement)) after.emplace(move.to_rank, move.expert, move.shard);
  for (const Holding& holding : holdings(new_placement)) EXPECT_EQ(after.count(holding), 1U);
}

}  // namespace
}  // namespace tokenyard
