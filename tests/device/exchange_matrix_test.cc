// The exchange on GPUs against the reference, bit for bit: pairwise over every factor, and seeded random cases. Rank r is a
// thread (or a process) on GPU r % gpu_count().
// TOKENYARD_CASE=n runs pairwise case n alone, TOKENYARD_SEED=n random case n; TOKENYARD_MOST_RANKS=n leaves larger worlds out;
// TOKENYARD_SOAK_SECONDS=n runs random cases that long.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <sstream>
#include <string>

#include "device/device_side.h"
#include "device/gpus.h"
#include "multirank/exchange_processes.h"
#include "multirank/exchange_run.h"

namespace tokenyard::device_test {
namespace {

using exchange_test::Case;
using exchange_test::CaseData;
using exchange_test::pairwise_cases;
using exchange_test::random_case;
using exchange_test::run_processes;

constexpr std::uint64_t kPairwiseSeed = 1;
constexpr std::uint64_t kRandomSeed = 40'000;
constexpr std::uint64_t kRandomCases = 200;
constexpr int kMostFailures = 25;  // cases: each may cost a deadline, and the next ones rarely say more

int ranks_of(const Case& c) { return static_cast<int>(c.number(exchange_test::kRanks)); }

// Of a rank, for all its cases.
const DeviceBuffer& pool(int rank) {
  static std::vector<DeviceBuffer> pools = [] {
    std::vector<DeviceBuffer> made;
    for (int r = 0; r < 8; ++r) made.emplace_back();
    return made;
  }();
  if (!pools[rank]) pools[rank] = value_or_throw(make_device_buffer(rank % gpu_count(), DeviceSide::kPoolBytes));
  return pools[rank];
}

void run_on_gpu(const CaseData& data, World& world, Transport transport) {
  const int gpu = use_gpu_of(world.rank());
  DeviceSide side(pool(world.rank()), gpu, world.size(), transport);
  exchange_test::run_rank(data, world, side);
}

// All ranks of a case as threads; false when it failed.
bool run_case(const Case& c, Transport transport = Transport::automatic) {
  const bool failed_before = testing::Test::HasFailure();
  const int parts_before = testing::UnitTest::GetInstance()->current_test_info()->result()->total_part_count();
  const CaseData data = make_case_data(c);
  for (int rank = 0; rank < ranks_of(c); ++rank) pool(rank);
  try {
    run_ranks(
        ranks_of(c), [&](World& world) { run_on_gpu(data, world, transport); }, data.options.timeout_ms);
  } catch (const std::exception& error) {
    ADD_FAILURE() << error.what() << "\n" << describe(c);
  }
  const int parts = testing::UnitTest::GetInstance()->current_test_info()->result()->total_part_count();
  return failed_before ? parts == parts_before : !testing::Test::HasFailure();
}

void run_cases(const std::vector<Case>& cases, Transport transport = Transport::automatic) {
  const char* const limit = std::getenv("TOKENYARD_MOST_RANKS");
  std::int64_t most_ranks = limit != nullptr ? std::strtol(limit, nullptr, 10) : std::numeric_limits<int>::max();
  if (transport == Transport::nccl_window) most_ranks = std::min<std::int64_t>(most_ranks, gpu_count());
  int failures = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    if (ranks_of(cases[i]) > most_ranks || run_case(cases[i], transport)) continue;
    std::cerr << "case " << i << " of " << cases.size() << " failed: " << describe(cases[i]) << std::endl;
    if (++failures < kMostFailures) continue;
    FAIL() << "stopped after " << kMostFailures << " failed cases, at " << i + 1 << " of " << cases.size();
  }
}

class DeviceExchange : public OnGpu {};

std::vector<Case> every_pair_of_factors() {
  std::vector<Case> cases = pairwise_cases(kPairwiseSeed, Device::cuda);
  if (const char* number = std::getenv("TOKENYARD_CASE")) cases = {cases.at(std::strtoull(number, nullptr, 10))};
  return cases;
}

std::vector<Case> random_cases() {
  std::vector<Case> cases;
  for (std::uint64_t i = 0; i < kRandomCases; ++i) cases.push_back(random_case(kRandomSeed + i, Device::cuda));
  if (const char* seed = std::getenv("TOKENYARD_SEED")) cases = {random_case(std::strtoull(seed, nullptr, 10), Device::cuda)};
  return cases;
}

TEST_F(DeviceExchange, EveryPairOfFactors) { run_cases(every_pair_of_factors()); }
TEST_F(DeviceExchange, RandomCases) { run_cases(random_cases()); }

// The cases that have a GPU for each rank.
class WindowExchange : public OnWindowsOfSeveral {};

TEST_F(WindowExchange, EveryPairOfFactors) { run_cases(every_pair_of_factors(), Transport::nccl_window); }
TEST_F(WindowExchange, RandomCases) { run_cases(random_cases(), Transport::nccl_window); }

TEST_F(DeviceExchange, Soak) {
  const char* seconds = std::getenv("TOKENYARD_SOAK_SECONDS");
  if (seconds == nullptr) GTEST_SKIP() << "TOKENYARD_SOAK_SECONDS is not set";
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::strtol(seconds, nullptr, 10));
  const auto first = static_cast<std::uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
  std::uint64_t seed = first;
  for (; std::chrono::steady_clock::now() < end; ++seed) {
    if (!run_case(random_case(seed, Device::cuda)))
      FAIL() << "TOKENYARD_SEED=" << seed << " replays it, after " << seed - first << " good ones";
  }
  RecordProperty("cases", static_cast<int>(seed - first));
  std::cout << seed - first << " cases from seed " << first << std::endl;
}

// argument: the transport, then seeds.
const exchange_test::RegisterBody kReplay("cuda.replay", [](World& world, const std::string& argument) {
  std::istringstream words(argument);
  std::string transport;
  words >> transport;
  for (std::uint64_t seed = 0; words >> seed;) {
    const CaseData data = make_case_data(random_case(seed, Device::cuda));
    run_on_gpu(data, world, parse_transport(transport));
  }
});

// One process per GPU; on one GPU a single case, since processes that share it take turns.
void replay_in_processes(Transport transport) {
  const int ranks = gpu_count() == 1 ? 2 : std::min(gpu_count(), 4);
  const int wanted = gpu_count() == 1 ? 1 : 20;
  std::string seeds(name(transport));
  int found = 0;
  for (std::uint64_t seed = kRandomSeed; found < wanted; ++seed) {
    if (ranks_of(random_case(seed, Device::cuda)) != ranks) continue;
    seeds += " " + std::to_string(seed);
    ++found;
  }
  for (const RankExit& exit : run_processes({.body = "cuda.replay", .argument = seeds, .ranks = ranks})) {
    EXPECT_EQ(exit.exit_code, 0) << "rank process " << exit.rank << " of " << ranks << ", seeds of " << seeds;
  }
}

TEST_F(DeviceExchange, RanksAsProcesses) { replay_in_processes(Transport::automatic); }
TEST_F(WindowExchange, RanksAsProcesses) { replay_in_processes(Transport::nccl_window); }

}  // namespace
}  // namespace tokenyard::device_test
