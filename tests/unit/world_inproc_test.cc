#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include "tokenyard/error.h"
#include "tokenyard/world.h"

namespace tokenyard {
namespace {

using Clock = std::chrono::steady_clock;

std::vector<std::byte> bytes_of(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

Failure failure_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const TransportError& error) {
    return error.failure();
  }
  ADD_FAILURE() << "no TransportError";
  return {};
}

std::int64_t ms_since(Clock::time_point begin) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - begin).count();
}

// What every rank says, different in length and content.
std::string words_of(int rank, int round) { return std::string(static_cast<std::size_t>(rank * round % 7), 'a') + std::to_string(rank); }

void expect_gathers(const World& world, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const auto all = world.all_gather(bytes_of(words_of(world.rank(), round)));
    ASSERT_EQ(static_cast<int>(all.size()), world.size());
    for (int rank = 0; rank < world.size(); ++rank) ASSERT_EQ(all[rank], bytes_of(words_of(rank, round)));
  }
}

TEST(WorldInproc, RanksKnowThemselvesAndTheirPeers) {
  const auto worlds = World::in_process(3, 1234);
  ASSERT_EQ(worlds.size(), 3U);
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(worlds[rank].rank(), rank);
    EXPECT_EQ(worlds[rank].local_rank(), rank);
    EXPECT_EQ(worlds[rank].size(), 3);
    EXPECT_EQ(worlds[rank].timeout_ms(), 1234);
    EXPECT_TRUE(worlds[rank].is_in_process());
    EXPECT_EQ(worlds[rank].generation(), worlds[0].generation());
    for (int peer = 0; peer < 3; ++peer) {
      EXPECT_EQ(worlds[rank].link(peer), rank == peer ? LinkKind::self : LinkKind::peer);
      EXPECT_FALSE(worlds[rank].host(peer).empty());
      EXPECT_TRUE(worlds[rank].alive(peer));
    }
  }
}

TEST(WorldInproc, BadArgumentsAreUsageErrors) {
  EXPECT_THROW(World::in_process(0), UsageError);
  EXPECT_THROW(World::in_process(-3), UsageError);
  EXPECT_THROW(World::in_process((1 << 16) + 1), UsageError);
  EXPECT_THROW(World::in_process(2, 0), UsageError);
  const World world = World::in_process(1).front();
  for (const int peer : {-1, 1, 1 << 30}) {
    EXPECT_THROW(world.link(peer), UsageError);
    EXPECT_THROW(world.host(peer), UsageError);
    EXPECT_THROW(world.alive(peer), UsageError);
  }
  EXPECT_THROW(world.all_gather(std::vector<std::byte>(std::size_t{16} << 20)), UsageError);
}

TEST(WorldInproc, ConnectChecksItsOptions) {
  EXPECT_THROW(World::connect({.rank = 2, .size = 2, .port = 9999}), UsageError);
  EXPECT_THROW(World::connect({.rank = -1, .size = 2, .port = 9999}), UsageError);
  EXPECT_THROW(World::connect({.rank = 0, .size = 0, .port = 9999}), UsageError);
  EXPECT_THROW(World::connect({.rank = 0, .size = 2, .port = 0}), UsageError);
  EXPECT_THROW(World::connect({.rank = 0, .size = 2, .port = 65536}), UsageError);
  EXPECT_THROW(World::connect({.rank = 0, .size = 2, .port = 9999, .timeout_ms = 0}), UsageError);
  // Off loopback, a secret is required.
  EXPECT_THROW(World::connect({.rank = 0, .size = 2, .address = "0.0.0.0", .port = 9999}), UsageError);
  EXPECT_THROW(World::connect({.rank = 1, .size = 2, .address = "192.0.2.1", .port = 9999}), UsageError);
  const World alone = World::connect({.rank = 0, .size = 1});
  EXPECT_EQ(alone.size(), 1);
  alone.barrier();
}

TEST(WorldInproc, GathersOfManySizes) {
  for (const int size : {1, 2, 3, 8}) run_ranks(size, [](World& world) { expect_gathers(world, 50); });
}

TEST(WorldInproc, LargeAndEmptyParts) {
  run_ranks(3, [](World& world) {
    const std::vector<std::byte> mine(world.rank() == 1 ? (std::size_t{16} << 20) - 1 : 0, std::byte{7});
    const auto all = world.all_gather(mine);
    for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(all[rank].size(), rank == 1 ? (std::size_t{16} << 20) - 1 : 0);
    EXPECT_EQ(all[1].back(), std::byte{7});
  });
}

TEST(WorldInproc, NobodyLeavesABarrierBeforeAllHaveEntered) {
  constexpr int kRanks = 8;
  std::atomic<int> entered{0};
  run_ranks(kRanks, [&](World& world) {
    for (int round = 1; round <= 200; ++round) {
      entered.fetch_add(1);
      world.barrier();
      ASSERT_GE(entered.load(), round * kRanks);
      world.barrier();
      ASSERT_LE(entered.load(), (round + 1) * kRanks);
    }
  });
}

TEST(WorldInproc, SplitNumbersByKeyThenRank) {
  run_ranks(8, [](World& world) {
    const int rank = world.rank();
    const auto sub = world.split(rank % 3, -rank);
    ASSERT_TRUE(sub);
    const std::vector<std::vector<int>> expected{{6, 3, 0}, {7, 4, 1}, {5, 2}};
    const std::vector<int>& members = expected[rank % 3];
    ASSERT_EQ(sub->size(), static_cast<int>(members.size()));
    EXPECT_EQ(members[sub->rank()], rank);
    EXPECT_EQ(sub->timeout_ms(), world.timeout_ms());
    const auto all = sub->all_gather(bytes_of(std::to_string(rank)));
    for (int i = 0; i < sub->size(); ++i) EXPECT_EQ(all[i], bytes_of(std::to_string(members[i])));
    EXPECT_EQ(sub->local_rank(), rank);

    const auto same_key = world.split(0, 5);
    ASSERT_TRUE(same_key);
    EXPECT_EQ(same_key->rank(), rank);
  });
}

TEST(WorldInproc, ANegativeColorGivesNoWorld) {
  run_ranks(4, [](World& world) {
    const auto sub = world.split(world.rank() < 2 ? -1 : 0, 0);
    EXPECT_EQ(sub.has_value(), world.rank() >= 2);
    if (sub) {
      EXPECT_EQ(sub->size(), 2);
    }
    EXPECT_FALSE(world.split(-7, 0));
    world.barrier();
  });
}

TEST(WorldInproc, GenerationsAreSharedByAWorldAndByNoOther) {
  std::mutex mutex;
  std::set<std::uint64_t> seen;
  std::size_t worlds = 0;
  run_ranks(6, [&](World& world) {
    const auto note = [&](const World& one) {
      const std::uint64_t generation = one.generation();
      const auto all = one.all_gather(std::as_bytes(std::span(&generation, 1)));
      for (const auto& other : all) EXPECT_EQ(0, std::memcmp(other.data(), &generation, sizeof generation));
      const std::lock_guard lock(mutex);
      if (one.rank() == 0) ++worlds;
      seen.insert(generation);
    };
    note(world);
    for (int round = 0; round < 5; ++round) {
      const auto half = world.split(world.rank() / 3, 0);
      note(*half);
      const auto nested = half->split(half->rank() % 2, 0);
      note(*nested);
    }
  });
  EXPECT_EQ(worlds, 1U + 5 * (2 + 4));
  EXPECT_EQ(seen.size(), worlds);
}

TEST(WorldInproc, SubWorldsAreUsedAtOnce) {
  run_ranks(4, [](World& world) {
    const auto pair = world.split(world.rank() / 2, 0);
    const auto cross = world.split(world.rank() % 2, 0);
    // Two threads of each rank, each with its own worlds.
    std::jthread other([&] { expect_gathers(*cross, 100); });
    expect_gathers(*pair, 100);
  });
}

TEST(WorldInproc, TheDeadlineNamesTheMissingRanks) {
  const auto begin = Clock::now();
  std::atomic<int> given_up{0};
  run_ranks(
      4,
      [&](World& world) {
        if (world.rank() == 1 || world.rank() == 3) {
          while (given_up < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
          return;
        }
        const Failure failure = failure_of([&] { world.barrier(); });
        EXPECT_EQ(failure.kind, FailureKind::timeout);
        EXPECT_EQ(failure.phase, Phase::barrier);
        EXPECT_EQ(failure.rank, world.rank());
        EXPECT_EQ(failure.peer, 1);
        EXPECT_NE(failure.detail.find("ranks 1, 3"), std::string::npos) << failure.detail;
        EXPECT_GE(ms_since(begin), 150);
        EXPECT_TRUE(world.alive(1)) << "late is not lost";
        ++given_up;
      },
      150);
}

TEST(WorldInproc, ALateRankLearnsThatItWasGivenUpAndTheNextCallWorks) {
  std::atomic<int> given_up{0};
  run_ranks(
      3,
      [&](World& world) {
        while (world.rank() == 2 && given_up < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        const Failure failure = failure_of([&] { world.barrier(); });
        EXPECT_EQ(failure.kind, FailureKind::timeout);
        EXPECT_EQ(failure.peer, 2);
        ++given_up;
        expect_gathers(world, 5);
      },
      1000);
}

TEST(WorldInproc, DifferentCallsAreAMismatch) {
  run_ranks(2, [](World& world) {
    const Failure failure = failure_of([&] {
      if (world.rank() == 0)
        world.barrier();
      else
        static_cast<void>(world.split(0, 0));
    });
    EXPECT_EQ(failure.kind, FailureKind::mismatch);
    EXPECT_NE(failure.detail.find("barrier"), std::string::npos) << failure.detail;
    EXPECT_NE(failure.detail.find("split"), std::string::npos) << failure.detail;
    world.barrier();
  });
}

TEST(WorldInproc, ARankThatThrowsFailsTheOthersAtOnce) {
  const auto begin = Clock::now();
  std::atomic<int> noticed{0};
  EXPECT_THROW(run_ranks(4,
                         [&](World& world) {
                           if (world.rank() == 2) throw std::domain_error("rank 2's own");
                           const Failure failure = failure_of([&] { world.barrier(); });
                           EXPECT_EQ(failure.kind, FailureKind::peer_lost);
                           EXPECT_EQ(failure.peer, 2);
                           EXPECT_FALSE(world.alive(2));
                           EXPECT_TRUE(world.alive(world.rank()));
                           ++noticed;
                         }),
               std::domain_error);
  EXPECT_EQ(noticed, 3);
  EXPECT_LT(ms_since(begin), 20'000) << "the deadline is 100 s";
}

TEST(WorldInproc, TheCauseIsReportedNotItsConsequences) {
  // Ranks 0 and 1 fail because of rank 2; whoever is first in time.
  EXPECT_THROW(run_ranks(3,
                         [](World& world) {
                           if (world.rank() == 2) {
                             world.leave();
                             std::this_thread::sleep_for(std::chrono::milliseconds(50));
                             throw std::domain_error("the cause");
                           }
                           world.barrier();
                         }),
               std::domain_error);
  // All fail alike: the lowest rank's error.
  for (int round = 0; round < 10; ++round) {
    try {
      run_ranks(4, [](World& world) { throw std::runtime_error(std::to_string(world.rank())); });
      FAIL();
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "0");
    }
  }
}

TEST(WorldInproc, ARankThatReturnsEarlyIsNamed) {
  const auto begin = Clock::now();
  run_ranks(3, [](World& world) {
    if (world.rank() == 0) return;
    const Failure failure = failure_of([&] { world.barrier(); });
    EXPECT_EQ(failure.kind, FailureKind::peer_lost);
    EXPECT_EQ(failure.peer, 0);
    EXPECT_NE(failure.detail.find("has closed its world"), std::string::npos) << failure.detail;
  });
  EXPECT_LT(ms_since(begin), 20'000);
}

TEST(WorldInproc, ALossIsNamedInTheNumbersOfTheSubWorld) {
  run_ranks(4, [](World& world) {
    const auto reversed = world.split(0, -world.rank());
    if (world.rank() == 3) {
      world.leave();
      return;
    }
    EXPECT_EQ(failure_of([&] { reversed->barrier(); }).peer, 0);
    EXPECT_FALSE(reversed->alive(0));
    const Failure failure = failure_of([&] { static_cast<void>(world.split(0, 0)); });
    EXPECT_EQ(failure.peer, 3);
    EXPECT_EQ(failure.phase, Phase::split);
  });
}

TEST(WorldInproc, WorldsWithoutTheLostRankCarryOn) {
  run_ranks(4, [](World& world) {
    const auto pair = world.split(world.rank() / 2, 0);
    world.barrier();
    if (world.rank() == 3) {
      world.leave();
    } else if (world.rank() != 2) {
      expect_gathers(*pair, 20);
    }
  });
}

TEST(WorldInproc, SurvivorsGoOnAsASmallerWorld) {
  run_ranks(5, [](World& world) {
    const auto sub = world.split(0, -world.rank());
    if (world.rank() == 1) return world.leave();
    if (world.rank() == 3) return;  // closes its world
    // The survivors have made different numbers of calls.
    for (int i = 0; i < world.rank(); ++i) EXPECT_EQ(failure_of([&] { world.barrier(); }).kind, FailureKind::peer_lost);
    const Survivors left = world.survivors();
    EXPECT_EQ(left.ranks, (std::vector<int>{0, 2, 4}));
    EXPECT_EQ(left.ranks[left.world.rank()], world.rank());
    EXPECT_NE(left.world.generation(), world.generation());
    expect_gathers(left.world, 10);
    // The same of a sub-world, in its own numbers: rank r of the world is 4 - r there.
    const Survivors of_sub = sub->survivors();
    EXPECT_EQ(of_sub.ranks, (std::vector<int>{0, 2, 4}));
    EXPECT_EQ(of_sub.world.rank(), (4 - world.rank()) / 2);
    expect_gathers(of_sub.world, 10);
  });
}

TEST(WorldInproc, WhoComesTooLateIsNoSurvivor) {
  std::atomic<int> met{0};
  run_ranks(
      3,
      [&](World& world) {
        if (world.rank() == 1) {
          while (met < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
          EXPECT_EQ(failure_of([&] { static_cast<void>(world.survivors()); }).kind, FailureKind::peer_lost);
          return;
        }
        const Survivors left = world.survivors();
        EXPECT_EQ(left.ranks, (std::vector<int>{0, 2}));
        EXPECT_FALSE(world.alive(1));
        ++met;
        expect_gathers(left.world, 5);
      },
      500);
}

TEST(WorldInproc, CopiesNameTheSameWorld) {
  run_ranks(2, [](World& world) {
    const World copy = world;
    copy.barrier();
    world.barrier();
    EXPECT_EQ(copy.generation(), world.generation());
    expect_gathers(copy, 3);
    expect_gathers(world, 3);
  });
}

TEST(WorldInproc, TwoWorldsOfOneProcessAreApart) {
  std::thread other([] { run_ranks(3, [](World& world) { expect_gathers(world, 50); }); });
  run_ranks(2, [](World& world) { expect_gathers(world, 50); });
  other.join();
}

TEST(WorldInproc, RandomSplitsAgreeWithASimulation) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 20; ++round) {
    const int size = 1 + static_cast<int>(random() % 6);
    std::vector<int> colors(size);
    std::vector<int> keys(size);
    for (int& color : colors) color = static_cast<int>(random() % 4) - 1;
    for (int& key : keys) key = static_cast<int>(random() % 3);
    run_ranks(size, [&](World& world) {
      std::vector<int> members;
      for (int rank = 0; rank < size; ++rank) {
        if (colors[rank] == colors[world.rank()]) members.push_back(rank);
      }
      std::stable_sort(members.begin(), members.end(), [&](int a, int b) { return keys[a] < keys[b]; });
      const auto sub = world.split(colors[world.rank()], keys[world.rank()]);
      ASSERT_EQ(sub.has_value(), colors[world.rank()] >= 0);
      if (!sub) return;
      ASSERT_EQ(sub->size(), static_cast<int>(members.size()));
      EXPECT_EQ(members[sub->rank()], world.rank());
    });
  }
}

}  // namespace
}  // namespace tokenyard
