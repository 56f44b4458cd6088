#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "mpi/mpi_world.h"
#include "multirank/collective_check.h"
#include "tokenyard/collective.h"
#include "tokenyard/error.h"

namespace tokenyard::mpi_test {
namespace {

using Clock = std::chrono::steady_clock;
using Counts = std::vector<std::int64_t>;
using collective_test::check_collectives;

// Rank 0's draw, so that all ranks make the same calls.
std::uint64_t common_seed() {
  const std::uint64_t mine = collective_test::test_seed();
  std::uint64_t seed = 0;
  std::memcpy(&seed, world().all_gather(std::as_bytes(std::span(&mine, 1)))[0].data(), sizeof(seed));
  return seed;
}

Failure failure_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const TransportError& error) {
    return error.failure();
  }
  ADD_FAILURE() << "no TransportError";
  return {.kind = FailureKind::overflow};
}

std::unique_ptr<Collectives> create(const World& ranks, int timeout_ms = 60'000) {
  return Collectives::create(ranks, {.transport = Transport::mpi, .timeout_ms = timeout_ms});
}

// counts[s] int64 rows from every rank s.
void gather(Collectives& collectives, const Counts& counts) {
  std::vector<std::int64_t> mine(100, collectives.world().rank()), all(100, -1);
  std::int64_t total = 0;
  for (std::int64_t count : counts) total += count;
  collectives.all_gather_v({mine.data(), Dtype::int64, {counts[collectives.world().rank()]}}, counts, {all.data(), Dtype::int64, {total}});
}

TEST(CollectiveMpi, RandomCalls) {
  const auto collectives = create(world());
  EXPECT_EQ(collectives->transport(), Transport::mpi);
  EXPECT_EQ(collectives->world().size(), world().size());
  check_collectives(*collectives, {.seed = common_seed(), .rounds = 40});
}

TEST(CollectiveMpi, LargeRows) {
  check_collectives(*create(world()), {.seed = common_seed(), .rounds = 3, .max_rows = 300, .max_elements = 4000});
}

TEST(CollectiveMpi, SubWorldsAreNumberedAsTheWorldIs) {
  // Odd and even ranks apart, each in descending order: neither number is MPI's.
  const World half = *world().split(world().rank() % 2, -world().rank());
  const auto whole = create(world());
  const auto part = create(half);
  const std::uint64_t seed = common_seed();
  for (int round = 0; round < 3; ++round) {
    check_collectives(*part, {.seed = seed + world().rank() % 2, .rounds = 3});
    check_collectives(*whole, {.seed = seed, .rounds = 3});
  }
}

TEST(CollectiveMpi, SameBitsAsDirect) {
  const auto over_mpi = create(world());
  const auto direct = Collectives::create(world());
  const std::int64_t rows = 37, elements = 333;
  Counts counts(world().size(), rows);
  std::vector<float> in(rows * elements * world().size()), a(rows * elements), b(rows * elements);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = 1.0F / static_cast<float>(1 + (i * 7919 + world().rank() * 104729) % 65521);
  const ConstTensorView whole{in.data(), Dtype::float32, {rows * world().size(), elements}};
  over_mpi->reduce_scatter_v(whole, counts, {a.data(), Dtype::float32, {rows, elements}});
  direct->reduce_scatter_v(whole, counts, {b.data(), Dtype::float32, {rows, elements}});
  EXPECT_EQ(a, b);
}

TEST(CollectiveMpiFailure, ARejectedCallFailsOnPeersAtOnceAndForGood) {
  const auto collectives = create(world());
  gather(*collectives, {1, 2, 3, 4});
  const auto begin = Clock::now();
  if (world().rank() == 2) {
    EXPECT_THROW(gather(*collectives, {1, 2, 3}), UsageError);
  } else {
    const Failure failure = failure_of([&] { gather(*collectives, {1, 2, 3, 4}); });
    EXPECT_EQ(failure.kind, FailureKind::aborted);
    EXPECT_EQ(failure.peer, 2);
    EXPECT_NE(failure.detail.find("counts has 3 entries"), std::string::npos) << failure.detail;
  }
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(20));
  EXPECT_EQ(failure_of([&] { collectives->barrier(); }).kind, FailureKind::aborted);
  world().barrier();
}

TEST(CollectiveMpiFailure, OtherCountsThanExpectedAreAMismatch) {
  for (const std::int64_t sent : {5, 7}) {  // rank 1 sends fewer, and more, than the 6 that the others expect
    const auto collectives = create(world(), 2000);
    if (world().rank() == 1) {
      gather(*collectives, {1, sent, 1, 1});
    } else {
      const Failure failure = failure_of([&] { gather(*collectives, {1, 6, 1, 1}); });
      EXPECT_EQ(failure.kind, FailureKind::mismatch) << failure.message();
      EXPECT_EQ(failure.peer, 1);
      EXPECT_NE(failure.detail.find("6 rows of 8 bytes"), std::string::npos) << failure.detail;
    }
    world().barrier();
  }
}

TEST(CollectiveMpiFailure, TheRankThatDidNotComeIsNamed) {
  const auto collectives = create(world(), 300);
  if (world().rank() != 3) {
    const Failure failure = failure_of([&] { gather(*collectives, {1, 1, 1, 1}); });
    EXPECT_EQ(failure.kind, FailureKind::timeout);
    EXPECT_EQ(failure.peer, 3);
    EXPECT_EQ(failure.epoch, 1);
    EXPECT_EQ(failure_of([&] { collectives->barrier(); }).message(), failure.message());
  }
  world().barrier();
}

TEST(CollectiveMpiFailure, AnAbandonedCallFailsOnPeersWithTheReason) {
  const auto collectives = create(world());
  if (world().rank() == 0) {
    collectives->abandon({.kind = FailureKind::overflow, .peer = 3, .detail = "no room"});
  } else {
    const Failure failure = failure_of([&] { gather(*collectives, {0, 1, 1, 1}); });  // nothing of it comes from rank 0
    EXPECT_EQ(failure.kind, FailureKind::overflow);
    EXPECT_EQ(failure.peer, 3);
    EXPECT_EQ(failure.detail, "no room");
  }
  world().barrier();
}

TEST(CollectiveMpiFailure, CancelEndsAWait) {
  const auto collectives = create(world());
  if (world().rank() == 0) {
    std::thread canceller([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      collectives->cancel();
    });
    EXPECT_EQ(failure_of([&] { collectives->barrier(); }).detail, "cancelled");
    canceller.join();
  }
  world().barrier();
}

TEST(CollectiveMpi, OwnRowsMayLieInPlace) {
  const auto collectives = create(world());
  const int ranks = world().size();
  Counts ones(ranks, 1), others(ranks, 1);
  others[world().rank()] = 0;
  const std::vector<std::int32_t> in(ranks - 1, world().rank());
  std::vector<std::int32_t> out(ranks, -5);
  collectives->all_to_all_v({in.data(), Dtype::int32, {ranks - 1}}, others, {out.data(), Dtype::int32, {ranks}}, ones);
  for (int source = 0; source < ranks; ++source) EXPECT_EQ(out[source], source == world().rank() ? -5 : source);
}

TEST(CollectiveMpiFailure, RanksOutsideTheJobAreRefused) {
  try {
    run_ranks(2, [](World& threads) { create(threads); });
    ADD_FAILURE() << "no error";
  } catch (const UsageError& error) {
    EXPECT_NE(std::string(error.what()).find("are threads"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace tokenyard::mpi_test
