#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "mpi/mpi_world.h"
#include "multirank/exchange_run.h"
#include "tokenyard/exchange.h"

namespace tokenyard::mpi_test {
namespace {

using exchange_test::Case;
using exchange_test::CaseData;

// The cases of the direct exchange that have as many ranks as are here, or fewer: the reference is the same, so the bits are.
int run_cases(const std::vector<Case>& cases) {
  int count = 0;
  for (const Case& c : cases) {
    const int ranks = static_cast<int>(c.number(exchange_test::kRanks));
    if (ranks > world().size()) continue;
    ++count;
    CaseData data = make_case_data(c);
    data.options.transport = Transport::mpi;
    auto part = world().split(world().rank() < ranks ? 0 : -1, world().rank());
    if (part) run_rank(data, *part);
  }
  return count;
}

TEST(ExchangeMpi, EveryPairOfFactors) { EXPECT_GT(run_cases(exchange_test::pairwise_cases(1)), world().size() == 1 ? 2 : 20); }

TEST(ExchangeMpi, RandomCases) {
  std::vector<Case> cases;
  for (std::uint64_t seed = 30'000; seed < 30'060; ++seed) cases.push_back(exchange_test::random_case(seed));
  EXPECT_GT(run_cases(cases), world().size() == 1 ? 2 : 20);
}

}  // namespace
}  // namespace tokenyard::mpi_test
