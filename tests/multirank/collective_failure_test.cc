#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "multirank/exchange_processes.h"
#include "tokenyard/collective.h"
#include "tokenyard/error.h"
#include "tokenyard/launch.h"

namespace tokenyard::collective_test {
namespace {

using Clock = std::chrono::steady_clock;
using Counts = std::vector<std::int64_t>;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// The failure that action() throws; one that cannot be mistaken for any when it throws none.
Failure failure_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const TransportError& error) {
    return error.failure();
  }
  ADD_FAILURE() << "no TransportError";
  return {.kind = FailureKind::overflow};
}

void gather_numbers(Collectives& collectives, const Counts& counts) {
  const int rank = collectives.world().rank();
  std::int64_t total = 0;
  for (std::int64_t count : counts) total += count;
  const std::vector<std::int64_t> mine(counts[rank], rank);
  std::vector<std::int64_t> all(total, -1);
  collectives.all_gather_v({mine.data(), Dtype::int64, {counts[rank]}}, counts, {all.data(), Dtype::int64, {total}});
  std::size_t i = 0;
  for (std::size_t source = 0; source < counts.size(); ++source) {
    for (std::int64_t n = 0; n < counts[source]; ++n) ASSERT_EQ(all[i++], static_cast<std::int64_t>(source));
  }
}

TEST(CollectiveFailures, ARejectedCallFailsOnPeersAtOnceAndTheNextIsFine) {
  run_ranks(4, [](World& world) {
    const auto collectives = Collectives::create(world, {.staging_bytes = 4096});
    for (int round = 0; round < 5; ++round) {
      const auto begin = Clock::now();
      if (world.rank() == 2) {
        std::int64_t numbers[4] = {};
        const Counts wrong{1, 1, 1, -7};
        EXPECT_THROW(collectives->all_gather_v({numbers, Dtype::int64, {1}}, wrong, {numbers, Dtype::int64, {4}}), UsageError);
      } else {
        const Failure failure = failure_of([&] { gather_numbers(*collectives, {1, 1, 1, 1}); });
        EXPECT_EQ(failure.kind, FailureKind::aborted);
        EXPECT_EQ(failure.peer, 2);
        EXPECT_EQ(failure.rank, world.rank());
        EXPECT_NE(failure.detail.find("counts[3] is -7"), std::string::npos) << failure.detail;
      }
      EXPECT_LT(seconds_since(begin), 20);  // the deadline is 100 s
      gather_numbers(*collectives, {500, 0, 3, 1200});
    }
  });
}

TEST(CollectiveFailures, DifferentCallsNameBothAndTheNextIsFine) {
  run_ranks(3, [](World& world) {
    const auto collectives = Collectives::create(world);
    const Failure operation = failure_of([&] {
      if (world.rank() == 1) {
        collectives->barrier();
      } else {
        gather_numbers(*collectives, {1, 2, 3});
      }
    });
    EXPECT_EQ(operation.kind, FailureKind::mismatch);
    EXPECT_EQ(operation.peer, world.rank() == 0 ? 1 : 0);
    EXPECT_EQ(operation.epoch, 1);
    EXPECT_NE(operation.detail.find("rank 0 called all_gather_v of 1 x int64, rank 1 called barrier"), std::string::npos)
        << operation.detail;
    const Failure counts = failure_of([&] { gather_numbers(*collectives, {1, 2, world.rank() == 0 ? 4 : 3}); });
    EXPECT_EQ(counts.kind, FailureKind::mismatch);
    EXPECT_EQ(counts.peer, world.rank() == 2 ? 0 : 2);
    EXPECT_NE(counts.detail.find("rank 2 sends 3 rows to rank 0, which expects 4"), std::string::npos) << counts.detail;
    gather_numbers(*collectives, {3, 2, 1});
  });
}

TEST(CollectiveFailures, OptionsAreAgreed) {
  run_ranks(3, [](World& world) {
    const Failure failure = failure_of([&] { Collectives::create(world, {.staging_bytes = world.rank() == 2 ? 8192 : 4096}); });
    EXPECT_EQ(failure.kind, FailureKind::mismatch);
    EXPECT_EQ(failure.peer, world.rank() == 2 ? 0 : 2);
    EXPECT_NE(failure.detail.find("8192"), std::string::npos) << failure.detail;
    EXPECT_NE(failure.detail.find("4096"), std::string::npos) << failure.detail;
    if (world.rank() == 0) {
      EXPECT_THROW(Collectives::create(world, {.staging_bytes = 100}), UsageError);
    } else {
      const Failure aborted = failure_of([&] { Collectives::create(world, {}); });
      EXPECT_EQ(aborted.kind, FailureKind::aborted);
      EXPECT_EQ(aborted.peer, 0);
      EXPECT_NE(aborted.detail.find("staging_bytes is 100"), std::string::npos) << aborted.detail;
    }
    EXPECT_THROW(Collectives::create(world, {.timeout_ms = 0}), UsageError);
    EXPECT_THROW(Collectives::create(world, {.transport = Transport::mpi}), UsageError);  // ranks that are threads have no MPI
    gather_numbers(*Collectives::create(world), {1, 1, 1});
  });
}

TEST(CollectiveFailures, TheRankThatDidNotComeIsNamedByAll) {
  run_ranks(4, [](World& world) {
    const auto collectives = Collectives::create(world, {.timeout_ms = 300});
    gather_numbers(*collectives, {1, 2, 3, 4});
    const auto begin = Clock::now();
    if (world.rank() != 2) {
      const Failure failure = failure_of([&] { collectives->barrier(); });
      EXPECT_EQ(failure.kind, FailureKind::timeout);
      EXPECT_EQ(failure.peer, 2);
      EXPECT_EQ(failure.phase, Phase::collective);
      EXPECT_EQ(failure.epoch, 2);
      EXPECT_EQ(failure.expected, 2);
      EXPECT_EQ(failure.seen, 1);
      EXPECT_GT(seconds_since(begin), 0.25);
      EXPECT_EQ(failure_of([&] { collectives->barrier(); }).message(), failure.message()) << "a timeout stays";
    }
    world.barrier();
    if (world.rank() == 2) {
      collectives->barrier();  // all others have been there
      EXPECT_EQ(failure_of([&] { collectives->barrier(); }).kind, FailureKind::timeout);
      EXPECT_LT(seconds_since(begin), 20) << "the peers' failure was not noticed";
    }
  });
}

TEST(CollectiveFailures, AnAbandonedCallFailsOnPeersWithTheReason) {
  run_ranks(3, [](World& world) {
    const auto collectives = Collectives::create(world);
    if (world.rank() == 1) {
      collectives->abandon({.kind = FailureKind::aborted, .peer = 1, .detail = "this batch is broken"});
    } else {
      const Failure failure = failure_of([&] { collectives->barrier(); });
      EXPECT_EQ(failure.kind, FailureKind::aborted);
      EXPECT_EQ(failure.peer, 1);
      EXPECT_EQ(failure.detail, "this batch is broken");
    }
    gather_numbers(*collectives, {1, 2, 3});
    if (world.rank() == 1) {
      collectives->abandon({.kind = FailureKind::overflow, .peer = 2});
    } else {
      const Failure failure = failure_of([&] { collectives->barrier(); });
      EXPECT_EQ(failure.kind, FailureKind::overflow);
      EXPECT_EQ(failure.peer, 2);
    }
    EXPECT_EQ(failure_of([&] { collectives->barrier(); }).kind, FailureKind::overflow) << "other reasons than aborted are final";
  });
}

TEST(CollectiveFailures, CancelEndsAWait) {
  run_ranks(2, [](World& world) {
    const auto collectives = Collectives::create(world);
    if (world.rank() == 0) {
      const auto begin = Clock::now();
      std::thread canceller([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        collectives->cancel();
      });
      EXPECT_EQ(failure_of([&] { collectives->barrier(); }).detail, "cancelled");
      EXPECT_LT(seconds_since(begin), 20);
      canceller.join();
      EXPECT_EQ(failure_of([&] { collectives->barrier(); }).kind, FailureKind::system);
    }
    world.barrier();
  });
}

TEST(CollectiveFailures, ALostThreadIsNoticedAtOnce) {
  const auto begin = Clock::now();
  try {
    run_ranks(4, [](World& world) {
      const auto collectives = Collectives::create(world, {.staging_bytes = 4096});
      gather_numbers(*collectives, {1, 2, 3, 4});
      if (world.rank() == 1) throw std::runtime_error("rank 1 gives up");
      const Failure failure = failure_of([&] { gather_numbers(*collectives, {5000, 5000, 5000, 5000}); });
      EXPECT_EQ(failure.kind, FailureKind::peer_lost);
      EXPECT_EQ(failure.peer, 1);
    });
    ADD_FAILURE() << "run_ranks did not rethrow";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "rank 1 gives up");
  }
  EXPECT_LT(seconds_since(begin), 20);
}

// Rank processes: rank 1 gets a signal somewhere within an endless row of transfers that need many rounds.
void transfers_until_failure(World& world, const std::string& kind) {
  const auto collectives = Collectives::create(world, {.staging_bytes = 4096, .timeout_ms = kind == "timeout" ? 1000 : 60'000});
  collectives->barrier();
  if (world.rank() == 1) {
    std::thread([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      ::kill(::getpid(), kind == "timeout" ? SIGSTOP : SIGKILL);
    }).detach();
  }
  const auto begin = Clock::now();
  const Failure failure = failure_of([&] {
    while (seconds_since(begin) < 30) gather_numbers(*collectives, {40'000, 40'000, 0, 40'000});
  });
  EXPECT_EQ(name(failure.kind), kind);
  EXPECT_EQ(failure.peer, 1) << failure.message();
  EXPECT_LT(seconds_since(begin), 10);
}
const exchange_test::RegisterBody kTransfersUntilFailure("collective_transfers_until_failure", transfers_until_failure);

TEST(CollectiveFailures, AKilledProcessIsNamed) {
  const auto exits = exchange_test::run_processes({.body = "collective_transfers_until_failure", .argument = "peer_lost", .ranks = 4});
  for (const RankExit& exit : exits) EXPECT_EQ(exit.exit_code, exit.rank == 1 ? 128 + SIGKILL : 0) << "rank " << exit.rank;
}

TEST(CollectiveFailures, AStoppedProcessIsNamed) {
  // The launcher ends the stopped rank when the run's time is over.
  const auto exits = exchange_test::run_processes(
      {.body = "collective_transfers_until_failure", .argument = "timeout", .ranks = 4, .run_timeout_ms = 6000});
  for (const RankExit& exit : exits) EXPECT_EQ(exit.exit_code, exit.rank == 1 ? 128 + SIGKILL : 0) << "rank " << exit.rank;
}

}  // namespace
}  // namespace tokenyard::collective_test
