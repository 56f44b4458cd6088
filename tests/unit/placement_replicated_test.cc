// Replicas follow the load, and the packing is even: better than dealing round-robin, near what is possible at all.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "unit/placement_gen.h"

namespace tokenyard {
namespace {

using Loads = std::vector<double>;

Loads zipf(int experts, double exponent, std::uint64_t seed) {
  Loads load(static_cast<std::size_t>(experts));
  for (int i = 0; i < experts; ++i) load[i] = 1e6 / std::pow(i + 1.0, exponent);
  std::mt19937_64 random(seed);
  std::shuffle(load.begin(), load.end(), random);
  return load;
}

Loads one_hot(int experts, double factor) {
  Loads load(static_cast<std::size_t>(experts), 1.0);
  load[static_cast<std::size_t>(experts) / 3] = factor;
  return load;
}

Loads uniform_random(int experts, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  Loads load(static_cast<std::size_t>(experts));
  for (double& value : load) value = static_cast<double>(random() % 100'000);
  return load;
}

Loads log_normal(int experts, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::lognormal_distribution<double> distribution(0.0, 1.5);
  Loads load(static_cast<std::size_t>(experts));
  for (double& value : load) value = distribution(random);
  return load;
}

double load_of_copy(const Placement& placement, const Loads& load, int expert) {
  return load[expert] / static_cast<double>(placement.replicas(expert).size());
}

Loads rank_loads(const Placement& placement, const Loads& load) {
  Loads result(static_cast<std::size_t>(placement.ranks()), 0.0);
  for (const Instance& i : placement.instances()) result[i.rank] += load_of_copy(placement, load, i.expert);
  return result;
}

double highest(const Loads& loads) { return *std::max_element(loads.begin(), loads.end()); }
double total(const Loads& loads) { return std::accumulate(loads.begin(), loads.end(), 0.0); }

// No packing with even counts has a lower peak: the mean, or the heaviest copy beside as many of the lightest as go with it.
double lower_bound(const Placement& placement, const Loads& load) {
  Loads copies;
  for (const Instance& i : placement.instances()) copies.push_back(load_of_copy(placement, load, i.expert));
  std::sort(copies.begin(), copies.end());
  const auto beside = std::ssize(copies) / placement.ranks() - 1;
  return std::max(total(load) / placement.ranks(), std::accumulate(copies.begin(), copies.begin() + beside, copies.back()));
}

// The same copies, dealt to the ranks in turn: in order of ids, or heaviest first.
double round_robin(const Placement& placement, const Loads& load, bool heaviest_first) {
  Loads copies;
  for (const Instance& i : placement.instances()) copies.push_back(load_of_copy(placement, load, i.expert));
  if (heaviest_first) std::sort(copies.rbegin(), copies.rend());
  Loads ranks(static_cast<std::size_t>(placement.ranks()), 0.0);
  for (std::size_t i = 0; i < copies.size(); ++i) ranks[i % ranks.size()] += copies[i];
  return highest(ranks);
}

void expect_even_counts(const Placement& placement) {
  const auto count = std::ssize(placement.instances());
  for (int rank = 0; rank < placement.ranks(); ++rank) {
    const auto local = std::ssize(placement.local_experts(rank));
    EXPECT_GE(local, count / placement.ranks());
    EXPECT_LE(local, (count + placement.ranks() - 1) / placement.ranks());
  }
}

TEST(PlacementReplicated, HeaviestExpertsGetTheCopies) {
  // 12/1 -> 12/2 -> then 7/1 is heaviest, then 6 = 12/2 -> 12/3: copies 3, 2, 1, 1.
  const Loads load = {12, 7, 3, 1};
  const Placement placement = Placement::replicated(4, 4, load, 3);
  const std::size_t expected[] = {3, 2, 1, 1};
  for (int expert = 0; expert < 4; ++expert) EXPECT_EQ(placement.replicas(expert).size(), expected[expert]) << expert;
}

TEST(PlacementReplicated, TiesGoToFewerCopiesThenLowerIds) {
  const Loads equal = {5, 5, 5, 5};
  const Placement placement = Placement::replicated(4, 3, equal, 2);
  const std::size_t expected[] = {2, 2, 1, 1};
  for (int expert = 0; expert < 4; ++expert) EXPECT_EQ(placement.replicas(expert).size(), expected[expert]) << expert;
  const Loads idle(4, 0.0);
  const Placement spread = Placement::replicated(4, 4, idle, 4);
  for (int expert = 0; expert < 4; ++expert) EXPECT_EQ(spread.replicas(expert).size(), 2U) << expert;
}

TEST(PlacementReplicated, AnExpertNeverHasMoreCopiesThanRanks) {
  const Placement placement = Placement::replicated(3, 2, Loads{1000, 1, 1}, 3);
  for (int expert = 0; expert < 3; ++expert) EXPECT_EQ(placement.replicas(expert).size(), 2U);
}

TEST(PlacementReplicated, PerfectPackingIsFound) {
  // 8 + 1, 7 + 2, 6 + 3, 5 + 4: nine on every rank.
  const Placement placement = Placement::replicated(8, 4, Loads{1, 2, 3, 4, 5, 6, 7, 8}, 0);
  for (const double load : rank_loads(placement, {1, 2, 3, 4, 5, 6, 7, 8})) EXPECT_DOUBLE_EQ(load, 9.0);
}

TEST(PlacementReplicated, SharesAreEqual) {
  const Placement placement = Placement::replicated(4, 4, Loads{12, 7, 3, 1}, 3);
  for (int expert = 0; expert < 4; ++expert) {
    for (const Replica& replica : placement.replicas(expert)) EXPECT_EQ(replica.share, 1U);
  }
}

struct Shape {
  int experts;
  int ranks;
  int redundant;
  double tolerance;  // how far above the lower bound; five copies per rank, half of them heavy, cannot be evened out further
};
constexpr Shape kShapes[] = {{256, 8, 32, 1.02},  {256, 32, 32, 1.02}, {256, 64, 64, 1.15}, {128, 8, 0, 1.02},
                             {128, 16, 16, 1.02}, {160, 8, 8, 1.02},   {64, 4, 4, 1.02},    {512, 8, 64, 1.02}};

void expect_beats_round_robin(const Loads& load, const Shape& shape) {
  const Placement placement = Placement::replicated(shape.experts, shape.ranks, load, shape.redundant);
  const double ours = highest(rank_loads(placement, load));
  EXPECT_LT(ours, round_robin(placement, load, false));
  EXPECT_LT(ours, round_robin(placement, load, true));
  EXPECT_LT(ours, highest(rank_loads(Placement::uniform(shape.experts, shape.ranks), load)));
  EXPECT_LE(ours, lower_bound(placement, load) * shape.tolerance);
  expect_even_counts(placement);
}

TEST(PlacementReplicated, BeatsRoundRobinOnSkewedLoads) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(::testing::Message() << shape.experts << " experts, " << shape.ranks << " ranks, " << shape.redundant << " redundant");
    for (std::uint64_t seed = 1; seed <= 4; ++seed) {
      SCOPED_TRACE(::testing::Message() << "seed " << seed);
      expect_beats_round_robin(zipf(shape.experts, 0.8, seed), shape);
      expect_beats_round_robin(zipf(shape.experts, 1.2, seed), shape);
      expect_beats_round_robin(uniform_random(shape.experts, seed), shape);
      expect_beats_round_robin(log_normal(shape.experts, seed), shape);
    }
  }
}

TEST(PlacementReplicated, AHotExpertIsSharedByAllRanks) {
  // 100 x the others: without copies one rank carries 131, the mean is 44. With 7 copies more the heat is gone.
  const Loads load = one_hot(256, 100);
  EXPECT_GE(highest(rank_loads(Placement::replicated(256, 8, load, 0), load)), 131);
  const Placement placement = Placement::replicated(256, 8, load, 8);
  EXPECT_GE(placement.replicas(256 / 3).size(), 8U);
  EXPECT_LE(highest(rank_loads(placement, load)), 1.05 * total(load) / 8);
}

TEST(PlacementReplicated, IsDeterministicAndPinned) {
  const Loads load = zipf(64, 1.0, 7);
  const Placement placement = Placement::replicated(64, 8, load, 8, {.ranks_per_node = 4});
  EXPECT_EQ(placement.hash(), Placement::replicated(64, 8, load, 8, {.ranks_per_node = 4}).hash());
  EXPECT_EQ(Placement::replicated(6, 2, Loads{9, 8, 1, 1, 1, 1}, 0).to_json(),
            R"({"ranks":2,"experts":[[{"ranks":[0],"share":1}],[{"ranks":[1],"share":1}],[{"ranks":[1],"share":1}],)"
            R"([{"ranks":[0],"share":1}],[{"ranks":[1],"share":1}],[{"ranks":[0],"share":1}]]})");
}

TEST(PlacementReplicated, NodesAreEvenToo) {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    const Loads load = zipf(256, 1.0, seed);
    const Placement placement = Placement::replicated(256, 32, load, 32, {.ranks_per_node = 8});
    const Loads ranks = rank_loads(placement, load);
    for (int node = 0; node < 4; ++node) {
      const double of_node = std::accumulate(ranks.begin() + node * 8, ranks.begin() + (node + 1) * 8, 0.0);
      EXPECT_LE(of_node, 1.01 * total(load) / 4) << "node " << node << " seed " << seed;
    }
    EXPECT_LE(highest(ranks), 1.02 * lower_bound(placement, load)) << "seed " << seed;
    expect_even_counts(placement);
  }
}

// Placement::custom refuses two copies on one rank, so building at all proves that rule.
RC_GTEST_PROP(PlacementReplicated, AnyShapeWorks, ()) {
  const int experts = *rc::gen::inRange(1, 20);
  const int nodes = *rc::gen::inRange(1, 4);
  const int ranks_per_node = *rc::gen::inRange(1, 5);
  const int ranks = nodes * ranks_per_node;
  const int redundant = *rc::gen::inRange(0, experts * (ranks - 1) + 1);
  const auto load = *rc::gen::container<std::vector<double>>(
      static_cast<std::size_t>(experts), rc::gen::map(rc::gen::inRange(0, 50), [](int value) { return value * value / 7.0; }));
  const Placement placement = Placement::replicated(experts, ranks, load, redundant, {.ranks_per_node = ranks_per_node});
  RC_ASSERT(std::ssize(placement.instances()) == experts + redundant);
  expect_even_counts(placement);
  for (int expert = 0; expert < experts; ++expert) {
    const auto replicas = placement.replicas(expert);
    RC_ASSERT(
        std::is_sorted(replicas.begin(), replicas.end(), [](const Replica& a, const Replica& b) { return a.shard_ranks < b.shard_ranks; }));
  }
}

}  // namespace
}  // namespace tokenyard
