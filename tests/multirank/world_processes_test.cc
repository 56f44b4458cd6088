#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "multirank/exchange_processes.h"
#include "multirank/world_failures.h"
#include "multirank/world_stopped.h"
#include "tokenyard/error.h"
#include "tokenyard/launch.h"
#include "tokenyard/world.h"
#include "world/tcp_server.h"

namespace tokenyard::world_test {
namespace {

using exchange_test::RegisterBody;
using exchange_test::run_processes;

constexpr int kNoticedWithinMs = 2000;  // death is noticed in milliseconds; the rest is for a loaded machine

int free_port() { return world_internal::listen_at(*world_internal::resolve("127.0.0.1", 0))->port; }

// The same ranks, meeting without the launcher's store: rank 0 holds it.
World meet_at(const World& world, const std::string& port, int timeout_ms) {
  return World::connect(
      {.rank = world.rank(), .size = world.size(), .local_rank = world.rank(), .port = std::stoi(port), .timeout_ms = timeout_ms});
}

// Until every rank has heard from the store that rank 0 holds: its last answers may still be on their way when rank 0 has its own.
// The launcher's store stays when rank 0 goes.
void settle(const World& launched, const World& met) {
  met.barrier();
  launched.barrier();
}

template <class T>
std::vector<T> gather(const World& world, const T& mine) {
  std::vector<T> all;
  for (const auto& bytes : world.all_gather(std::as_bytes(std::span(&mine, 1)))) {
    T value;
    EXPECT_EQ(bytes.size(), sizeof value);
    std::memcpy(&value, bytes.data(), sizeof value);
    all.push_back(value);
  }
  return all;
}

void expect_ok(const std::vector<RankExit>& exits, const std::set<int>& killed = {}) {
  for (const RankExit& exit : exits) {
    EXPECT_EQ(exit.exit_code, killed.contains(exit.rank) ? 128 + SIGKILL : 0) << "rank " << exit.rank;
    EXPECT_EQ(exit.signal, killed.contains(exit.rank) ? SIGKILL : 0) << "rank " << exit.rank;
  }
}

const RegisterBody kMeet("world.meet", [](World& world, const std::string&) {
  EXPECT_FALSE(world.is_in_process());
  const std::vector<int> pids = gather(world, getpid());
  EXPECT_EQ(std::set<int>(pids.begin(), pids.end()).size(), static_cast<std::size_t>(world.size()));
  for (int peer = 0; peer < world.size(); ++peer) {
    EXPECT_TRUE(world.alive(peer));
    EXPECT_EQ(world.link(peer), peer == world.rank() ? LinkKind::self : LinkKind::peer);
  }
  const auto sub = world.split(world.rank() % 3, -world.rank());
  const std::vector<int> ranks = gather(*sub, world.rank());
  for (std::size_t i = 1; i < ranks.size(); ++i) EXPECT_EQ(ranks[i], ranks[i - 1] - 3);
  world.barrier();
});

TEST(WorldProcesses, EightRanksMeet) { expect_ok(run_processes({.body = "world.meet", .ranks = 8})); }
TEST(WorldProcesses, OneRankMeetsItself) { expect_ok(run_processes({.body = "world.meet", .ranks = 1})); }

const RegisterBody kKilled("world.killed", [](World& world, const std::string&) {
  const auto others = world.split(world.rank() == 2 ? -1 : 0, 0);
  if (world.rank() == 2) raise(SIGKILL);
  const Stopwatch watch;
  const Failure failure = failure_of([&] { world.barrier(); });
  EXPECT_LT(watch.ms(), kNoticedWithinMs);
  EXPECT_EQ(failure.kind, FailureKind::peer_lost);
  EXPECT_EQ(failure.phase, Phase::barrier);
  EXPECT_EQ(failure.rank, world.rank());
  EXPECT_EQ(failure.peer, 2);
  EXPECT_NE(failure.detail.find("rank 2 was "), std::string::npos) << failure.detail;
  EXPECT_FALSE(world.alive(2));
  EXPECT_TRUE(world.alive(world.rank() == 0 ? 1 : 0));
  EXPECT_EQ(failure_of([&] { static_cast<void>(world.split(0, 0)); }).peer, 2);
  others->barrier();  // until all have seen that all of them are alive
});

TEST(WorldProcesses, AKilledRankIsNamedAtOnce) { expect_ok(run_processes({.body = "world.killed", .ranks = 4}), {2}); }

const RegisterBody kSurvivors("world.survivors", [](World& world, const std::string&) {
  world.barrier();
  if (world.rank() == 1) raise(SIGKILL);
  if (world.rank() == 3) raise(SIGSTOP);
  const Survivors left = world.survivors();
  EXPECT_EQ(left.ranks, (std::vector<int>{0, 2, 4}));
  EXPECT_EQ(gather(left.world, world.rank()), left.ranks);
  EXPECT_TRUE(comes_true(kNoticedWithinMs, [&] { return !world.alive(1) && !world.alive(3); })) << "given up is lost";
});

TEST(WorldProcesses, SurvivorsMeetWithoutTheDeadAndTheStopped) {
  EndStopped end(5000);
  expect_ok(run_processes({.body = "world.survivors", .ranks = 5, .timeout_ms = 2000, .on_start = end.on_start()}), {1, 3});
}

// Nobody calls the store: the process itself is watched.
const RegisterBody kWatched("world.watched", [](World& world, const std::string&) {
  world.barrier();
  if (world.rank() == 0) raise(SIGKILL);
  const Stopwatch watch;
  EXPECT_TRUE(comes_true(kNoticedWithinMs, [&] { return !world.alive(0); }));
  EXPECT_TRUE(world.alive(world.rank()));
});

TEST(WorldProcesses, DeathShowsInAlive) { expect_ok(run_processes({.body = "world.watched", .ranks = 3}), {0}); }

std::int64_t now_ms() {  // of the machine: the ranks' clocks are one
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
}

const RegisterBody kStopped("world.stopped", [](World& world, const std::string&) {
  const auto others = world.split(world.rank() == 1 ? -1 : 0, 0);
  if (world.rank() == 1) raise(SIGSTOP);
  const std::int64_t begin = now_ms();
  const Failure failure = failure_of([&] { world.barrier(); });
  const std::int64_t end = now_ms();
  const std::vector<std::int64_t> begins = gather(*others, begin);
  const std::int64_t waited = end - *std::min_element(begins.begin(), begins.end());  // the first to call is the first to give up
  EXPECT_GE(waited, world.timeout_ms());
  EXPECT_LT(waited, world.timeout_ms() + 1000);
  EXPECT_EQ(failure.kind, FailureKind::timeout);
  EXPECT_EQ(failure.peer, 1);
  EXPECT_TRUE(world.alive(1)) << "stopped, not dead";
  EXPECT_TRUE(comes_true(10'000, [&] { return !world.alive(1); })) << "the test ends it";
});

TEST(WorldProcesses, AStoppedRankIsNamedAtTheDeadline) {
  EndStopped end(4000);
  expect_ok(run_processes({.body = "world.stopped", .ranks = 3, .timeout_ms = 1500, .on_start = end.on_start()}), {1});
}

const RegisterBody kStoreKilled("world.store_killed", [](World& world, const std::string& port) {
  const World met = meet_at(world, port, 60'000);
  const auto others = world.split(world.rank() == 0 ? -1 : 0, 0);
  settle(world, met);
  if (met.rank() == 0) raise(SIGKILL);
  const Stopwatch watch;
  const Failure failure = failure_of([&] { met.barrier(); });
  EXPECT_LT(watch.ms(), kNoticedWithinMs);
  EXPECT_EQ(failure.kind, FailureKind::peer_lost);
  EXPECT_EQ(failure.peer, 0);
  EXPECT_NE(failure.detail.find("the store at 127.0.0.1:" + port + " (rank 0) ended"), std::string::npos) << failure.detail;
  EXPECT_FALSE(met.alive(0));
  EXPECT_TRUE(met.alive(3 - met.rank()));
  others->barrier();  // until both have seen it
});

TEST(WorldProcesses, TheDeathOfTheStoresHolderIsSaid) {
  expect_ok(run_processes({.body = "world.store_killed", .argument = std::to_string(free_port()), .ranks = 3}), {0});
}

const RegisterBody kStoreStopped("world.store_stopped", [](World& world, const std::string& port) {
  const World met = meet_at(world, port, 3000);
  settle(world, met);
  if (met.rank() == 0) raise(SIGSTOP);
  const Stopwatch watch;
  const Failure failure = failure_of([&] { met.barrier(); });
  EXPECT_LT(watch.ms(), 3000 + 1000);
  EXPECT_EQ(failure.kind, FailureKind::timeout);
  EXPECT_EQ(failure.peer, 0);
  EXPECT_NE(failure.detail.find("did not answer"), std::string::npos) << failure.detail;
});

TEST(WorldProcesses, AStoppedHolderOfTheStoreIsNamedAtTheDeadline) {
  EndStopped end(6000);
  const std::string port = std::to_string(free_port());
  expect_ok(run_processes({.body = "world.store_stopped", .argument = port, .ranks = 3, .on_start = end.on_start()}), {0});
}

// A rank that ends without a word, and with exit code 0, is as gone as one that was killed.
const RegisterBody kVanished("world.vanished", [](World& world, const std::string&) {
  world.barrier();
  if (world.rank() == 1) _exit(0);
  const Stopwatch watch;
  EXPECT_EQ(failure_of([&] { world.barrier(); }).peer, 1);
  EXPECT_LT(watch.ms(), kNoticedWithinMs);
});

TEST(WorldProcesses, ARankThatEndsWithoutAWordIsNamed) { expect_ok(run_processes({.body = "world.vanished", .ranks = 3})); }

// The environment, in a process of its own.
const RegisterBody kEnvironment("world.environment", [](World& world, const std::string&) {
  EXPECT_EQ(world.timeout_ms(), 4321);
  const auto set = [](const std::vector<std::pair<const char*, std::string>>& values) {
    for (const char* name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TOKENYARD_PORT", "TOKENYARD_STORE",
                             "TOKENYARD_TOKEN", "TOKENYARD_TIMEOUT_MS"}) {
      unsetenv(name);
    }
    for (const auto& [name, value] : values) setenv(name, value.c_str(), 1);
  };
  set({});
  EXPECT_EQ(World::from_env().size(), 1);
  EXPECT_EQ(World::from_env().timeout_ms(), 100'000);
  set({{"TOKENYARD_TIMEOUT_MS", "77"}});
  EXPECT_EQ(World::from_env().timeout_ms(), 77);
  set({{"RANK", "0"}});
  EXPECT_THROW(World::from_env(), UsageError);
  set({{"RANK", "0"}, {"WORLD_SIZE", "2"}});
  EXPECT_THROW(World::from_env(), UsageError);
  set({{"RANK", "2"}, {"WORLD_SIZE", "2"}, {"MASTER_PORT", "5"}});
  EXPECT_THROW(World::from_env(), UsageError);
  for (const char* bad : {"", "x", "-1", "1.5", "99999999999"}) {
    set({{"RANK", bad}, {"WORLD_SIZE", "2"}, {"MASTER_PORT", "5"}});
    EXPECT_THROW(World::from_env(), UsageError) << bad;
  }
  // The store's port is the launcher's plus one, unless it is named.
  const auto server = world_internal::TcpServer::start(*world_internal::resolve("127.0.0.1", 0), 1, "secret");
  set({{"RANK", "0"},
       {"WORLD_SIZE", "1"},
       {"LOCAL_RANK", "3"},
       {"MASTER_ADDR", "localhost"},
       {"MASTER_PORT", std::to_string((*server)->port() - 1)},
       {"TOKENYARD_STORE", "1"},
       {"TOKENYARD_TOKEN", "secret"}});
  EXPECT_EQ(World::from_env().local_rank(), 3);
});

TEST(WorldProcesses, TheEnvironmentIsReadAndChecked) {
  expect_ok(run_processes({.body = "world.environment", .ranks = 1, .timeout_ms = 4321}));
}

}  // namespace
}  // namespace tokenyard::world_test
