// Exchanges come and go without leaving memory or descriptors behind.

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "multirank/exchange_processes.h"
#include "multirank/exchange_small.h"

namespace tokenyard::exchange_test {
namespace {

constexpr bool kSanitized = TY_SANITIZED;

struct Usage {
  std::int64_t resident_kb = 0;
  std::int64_t descriptors = 0;
  std::int64_t mappings = 0;
  std::int64_t threads = 0;
};

Usage usage() {
  Usage now;
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    if (word == "VmRSS:") status >> now.resident_kb;
    if (word == "Threads:") status >> now.threads;
  }
  now.descriptors = std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) ++now.mappings;
  return now;
}

// One life: with a lease and a handle that outlive their exchange, now and then.
void live(World& world, int cycle) {
  ExchangeOptions options = small_options();
  options.num_threads = 1 + cycle % 2;
  Received outliving;
  const SmallTokens<float> tokens(world.rank(), static_cast<unsigned>(cycle));
  {
    Exchange exchange(world, options);
    exchange.add(small_placement(world.size()));
    const Received received = exchange.dispatch(tokens.input());
    const Combined combined = exchange.combine(received.rows(), received.handle());
    EXPECT_EQ(combined.out.shape[0], tokens.tokens);
    if (cycle % 3 == 0) (void)exchange.start_dispatch(tokens.input());  // dropped while it runs
    if (cycle % 5 == 0) outliving = received;
  }
  if (cycle % 5 != 0) return;
  EXPECT_EQ(outliving.row_weights().num_elements(), outliving.num_rows() * kSmallTopK);
}

// While no other rank of this process looks: its open files would count.
Usage usage_in_turn(World& world) {
  Usage now;
  for (int turn = 0; turn < world.size(); ++turn) {
    world.barrier();
    if (turn == world.rank()) now = usage();
  }
  world.barrier();
  return now;
}

void expect_flat(World& world, int warm_up, int cycles) {
  for (int cycle = 0; cycle < warm_up; ++cycle) live(world, cycle);
  const Usage before = usage_in_turn(world);
  for (int cycle = 0; cycle < cycles; ++cycle) live(world, cycle);
  const Usage after = usage_in_turn(world);
  if (!kSanitized) {  // sanitizers keep what was freed
    EXPECT_LE(after.resident_kb, before.resident_kb + 4096) << "after " << cycles << " cycles";
    EXPECT_LE(after.mappings, before.mappings + 16);
  }
  EXPECT_EQ(after.descriptors, before.descriptors);
  EXPECT_EQ(after.threads, before.threads);
  world.barrier();
}

TEST(ExchangeLifetime, TenThousandInProcess) {
  run_ranks(2, [](World& world) { expect_flat(world, 200, 10'000); });
}

const RegisterBody kLives("lives", [](World& world, const std::string&) { expect_flat(world, 20, 300); });

TEST(ExchangeLifetime, HundredsOverSharedMemory) {
  for (const RankExit& exit : run_processes({.body = "lives", .ranks = 2})) EXPECT_EQ(exit.exit_code, 0) << "rank " << exit.rank;
}

}  // namespace
}  // namespace tokenyard::exchange_test
