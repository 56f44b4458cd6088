// The replica of a token: one fixed function of source rank and token, in proportion to the shares.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>

#include "placement/table.h"
#include "unit/placement_gen.h"

namespace tokenyard {
namespace {

// Independent of the table: walks the shares.
int expected_replica(std::span<const Replica> replicas, std::uint32_t mixed) {
  std::uint64_t total = 0;
  for (const Replica& replica : replicas) total += replica.share;
  std::uint64_t ticket = mixed % total;
  int index = 0;
  while (ticket >= replicas[index].share) ticket -= replicas[index++].share;
  return index;
}

// Every backend and every later version must choose the same replicas. (Values from a script outside the library.)
TEST(ReplicaChoice, MixIsFixed) {
  EXPECT_EQ(placement_internal::mix(0, 0), 0x92ca2f0eU);
  EXPECT_EQ(placement_internal::mix(1, 0), placement_internal::mix(0, 0x9e3779b9U));
  EXPECT_EQ(placement_internal::mix(3, 12345), 0x8ee55794U);
}

RC_GTEST_PROP(ReplicaChoice, FollowsSharesAndMix, ()) {
  const Placement placement = (*testing::any_parts()).build();
  const int expert = *rc::gen::inRange(0, placement.num_experts());
  const int source = *rc::gen::inRange(0, placement.ranks());
  const auto token = *rc::gen::arbitrary<std::int64_t>();
  const auto mixed = placement_internal::mix(static_cast<std::uint32_t>(source), static_cast<std::uint32_t>(token));
  RC_ASSERT(placement.replica_for(expert, source, token) == expected_replica(placement.replicas(expert), mixed));
}

TEST(ReplicaChoice, IsProportionalToShares) {
  const Placement placement = Placement::custom(8, {{{{0}, 1}, {{3}, 2}, {{5}, 5}}, {{{1}, 1}}});
  constexpr int kTokens = 20000;
  for (int source = 0; source < 8; ++source) {
    std::vector<int> seen(3, 0);
    for (int token = 0; token < kTokens; ++token) ++seen[placement.replica_for(0, source, token)];
    for (int replica = 0; replica < 3; ++replica) {
      const double p = placement.replicas(0)[replica].share / 8.0;
      // Five standard deviations of a binomial count: the mix behaves like a fair coin, or nearly always this fails.
      EXPECT_NEAR(seen[replica], kTokens * p, 5 * std::sqrt(kTokens * p * (1 - p))) << "source " << source << " replica " << replica;
    }
    EXPECT_EQ(placement.replica_for(1, source, 7), 0);  // the only replica, also where others have more
  }
}

// One token per rank and step, as in decode: the choice must spread over sources and over steps alike.
TEST(ReplicaChoice, SpreadsOverSourcesAtOneToken) {
  constexpr int kRanks = 4096;
  const Placement placement = Placement::custom(kRanks, {{{{0}, 1}, {{1}, 1}}});
  int first = 0;
  for (int source = 0; source < kRanks; ++source) first += placement.replica_for(0, source, 0) == 0 ? 1 : 0;
  EXPECT_NEAR(first, kRanks / 2, 5 * std::sqrt(kRanks) / 2);
}

// token_base is added to the index: the second half of a batch, sent as a micro-batch of its own, chooses as before.
TEST(ReplicaChoice, IsStableUnderTokenBase) {
  const Placement placement = Placement::custom(2, {{{{0}, 3}, {{1}, 4}}});
  const std::int64_t token_base = 512;
  std::vector<int> whole;
  for (std::int64_t token = 0; token < 1024; ++token) whole.push_back(placement.replica_for(0, 1, token));
  for (std::int64_t token = 0; token < 512; ++token) {
    EXPECT_EQ(placement.replica_for(0, 1, token + token_base), whole[static_cast<std::size_t>(token + token_base)]);
  }
  EXPECT_EQ(placement.replica_for(0, 1, (std::int64_t{1} << 32) + 5), whole[5]);  // indices count modulo 2^32
}

}  // namespace
}  // namespace tokenyard
