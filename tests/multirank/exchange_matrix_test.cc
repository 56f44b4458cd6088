// The exchange against the reference, bit for bit: pairwise over every factor, and seeded random cases.
// TOKENYARD_SEED=n replays random case n.

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <sstream>

#include "multirank/exchange_processes.h"
#include "multirank/exchange_run.h"

namespace tokenyard::exchange_test {
namespace {

constexpr std::uint64_t kPairwiseSeed = 1;
constexpr std::uint64_t kRandomSeed = 10'000;
constexpr int kRandomCases = 50;

std::vector<Case> random_cases() {
  std::vector<Case> cases;
  if (const char* seed = std::getenv("TOKENYARD_SEED")) return {random_case(std::strtoull(seed, nullptr, 10))};
  for (int i = 0; i < kRandomCases; ++i) cases.push_back(random_case(kRandomSeed + static_cast<std::uint64_t>(i)));
  return cases;
}

std::vector<Case> cases_of(const std::string& set) { return set == "pairwise" ? pairwise_cases(kPairwiseSeed) : random_cases(); }

// argument: the set, then the indices of cases.
void replay(World& world, const std::string& argument) {
  std::istringstream words(argument);
  std::string set;
  words >> set;
  const std::vector<Case> cases = cases_of(set);
  for (std::size_t index = 0; words >> index;) {
    const CaseData data = make_case_data(cases.at(index));
    run_rank(data, world);
  }
}
const RegisterBody kReplay("replay", replay);

constexpr std::size_t kShares = 4;  // of the pairwise cases, side by side: sanitizers make them long

// In-process cases as threads, the others in processes: one launch for each number of ranks. Case `first` and every `step`-th.
void run_set(const std::string& set, std::size_t first, std::size_t step) {
  std::map<int, std::string> indices_by_ranks;
  const std::vector<Case> cases = cases_of(set);
  for (std::size_t i = first; i < cases.size(); i += step) {
    if (cases[i].is(kMemory))
      indices_by_ranks[static_cast<int>(cases[i].number(kRanks))] += " " + std::to_string(i);
    else
      run_threads(cases[i]);
  }
  for (const auto& [ranks, indices] : indices_by_ranks) {
    for (const RankExit& exit : run_processes({.body = "replay", .argument = set + indices, .ranks = ranks})) {
      EXPECT_EQ(exit.exit_code, 0) << "rank process " << exit.rank << " of " << ranks << ", " << set << " cases" << indices;
    }
  }
}

class ExchangePairs : public testing::TestWithParam<std::size_t> {};
TEST_P(ExchangePairs, EveryPairOfFactors) { run_set("pairwise", GetParam(), kShares); }
INSTANTIATE_TEST_SUITE_P(Shares, ExchangePairs, testing::Range(std::size_t{0}, kShares));

// Shards of one k, of which some also serve a later k: the order of ranks by their last k must not show in an unfolded sum.
TEST(ExchangeMatrix, UnfoldedShardsAreAddedInRankOrder) {
  constexpr int kWanted = 8;
  int found = 0;
  for (std::uint64_t seed = kRandomSeed; found < kWanted; ++seed) {
    const Case c = random_case(seed);
    if (c.is(kFold) || c.is(kMemory) || c.as<Order>(kOrder) != Order::topk || c.number(kTopK) < 6) continue;
    if (c.as<Placed>(kPlacement) != Placed::sharded_replicas && c.as<Placed>(kPlacement) != Placed::tensor_parallel) continue;
    ++found;
    run_threads(c);
  }
}

TEST(ExchangeMatrix, RandomCases) { run_set("random", 0, 1); }

}  // namespace
}  // namespace tokenyard::exchange_test
