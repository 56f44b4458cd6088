// Survivors go on after a rank is gone.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "tokenyard/tokenyard.h"

namespace tokenyard {
namespace {

constexpr int kHidden = 16;
constexpr int kTimeoutMs = 20'000;

ExchangeOptions small_options() {
  ExchangeOptions options;
  options.max_tokens_per_rank = 8;
  options.max_row_bytes = kHidden * 4;
  options.top_k = 2;
  options.max_local_experts = 4;
  return options;
}

// Token t of a rank goes to experts t % E and (t + 1) % E; identity experts, so every instance that is left adds one row.
struct Batch {
  explicit Batch(int num_experts) {
    for (int t = 0; t < 8; ++t) {
      for (int h = 0; h < kHidden; ++h) rows.push_back(static_cast<float>(t * 100 + h + 1));
      ids.push_back(t % num_experts);
      ids.push_back((t + 1) % num_experts);
    }
  }
  DispatchInput input() const {
    DispatchInput given;
    given.rows = {rows.data(), Dtype::float32, {8, kHidden}};
    given.topk_ids = {ids.data(), Dtype::int64, {8, 2}};
    return given;
  }
  std::vector<float> rows;
  std::vector<std::int64_t> ids;
};

// Dispatch and combine; out[t] must be (living experts of t) x row.
void expect_living_sums(Exchange& exchange, const Batch& batch, const std::vector<bool>& lives) {
  DispatchOptions options;
  options.layout = Layout::expert_major;
  const Received received = exchange.dispatch(batch.input(), options);
  const Combined sums = exchange.combine(received.rows(), received.handle());
  for (int t = 0; t < 8; ++t) {
    const int terms = static_cast<int>(lives[batch.ids[2 * t]]) + static_cast<int>(lives[batch.ids[2 * t + 1]]);
    for (int h = 0; h < kHidden; ++h) {
      ASSERT_EQ(sums.out.as<float>()[t * kHidden + h], static_cast<float>(terms) * batch.rows[t * kHidden + h]) << "token " << t;
    }
  }
}

// Rank `victim` leaves; the others see it named, recover, and go on.
void lose_and_recover(const Placement& placement, int victim, const std::vector<bool>& lives) {
  std::atomic<int> recovered{0};
  const auto rank_main = [&](World& world) {
    Exchange exchange(world, small_options());
    exchange.add(placement);
    const Batch batch(placement.num_experts());
    expect_living_sums(exchange, batch, std::vector<bool>(lives.size(), true));
    const Handle before = exchange.dispatch(batch.input()).handle();
    if (world.rank() == victim) throw Error("gone on purpose");
    try {
      exchange.dispatch(batch.input());
      ADD_FAILURE() << "a dispatch without rank " << victim << " succeeded";
    } catch (const TransportError& error) {
      EXPECT_EQ(error.failure().kind, FailureKind::peer_lost) << error.what();
      EXPECT_EQ(error.failure().peer, victim) << error.what();
    }
    const std::vector<int> former = exchange.recover();
    EXPECT_EQ(former.size(), static_cast<std::size_t>(world.size()) - 1);
    EXPECT_EQ(former[exchange.world().rank()], world.rank());
    EXPECT_FALSE(exchange.status().failure);
    for (int round = 0; round < 3; ++round) expect_living_sums(exchange, batch, lives);
    const bool all_live = std::find(lives.begin(), lives.end(), false) == lives.end();
    EXPECT_EQ(exchange.status().lost_ids == 0, all_live);
    EXPECT_THROW(exchange.dispatch({batch.input().rows, {}, {}, {}}, before), UsageError);
    expect_living_sums(exchange, batch, lives);  // a refused call is no obstacle
    ++recovered;
  };
  EXPECT_THROW(run_ranks(4, rank_main, kTimeoutMs), Error);
  EXPECT_EQ(recovered, 3);
}

TEST(ExchangeRecover, ExpertsOfTheLostRankContributeZero) {
  const std::vector<bool> lives = {true, true, false, false, true, true, true, true};
  lose_and_recover(Placement::uniform(8, 4), 1, lives);
}

TEST(ExchangeRecover, TheFirstRankMayBeLost) {
  const std::vector<bool> lives = {false, false, true, true, true, true, true, true};
  lose_and_recover(Placement::uniform(8, 4), 0, lives);
}

TEST(ExchangeRecover, ReplicasTakeOver) {
  std::vector<std::vector<Replica>> replicas;
  for (int expert = 0; expert < 8; ++expert) replicas.push_back({{{expert % 4}, 1}, {{(expert + 1) % 4}, 2}});
  lose_and_recover(Placement::custom(4, replicas), 2, std::vector<bool>(8, true));
}

TEST(ExchangeRecover, ARankThatDoesNotComeIsLeftOut) {
  std::atomic<bool> others_done{false};
  std::atomic<int> recovered{0};
  run_ranks(
      3,
      [&](World& world) {
        ExchangeOptions options = small_options();
        options.timeout_ms = 300;
        Exchange exchange(world, options);
        exchange.add(Placement::uniform(6, 3));
        const Batch batch(6);
        if (world.rank() == 2) {  // slow: it makes neither the dispatch nor the meeting
          while (!others_done) std::this_thread::sleep_for(std::chrono::milliseconds(5));
          EXPECT_THROW(exchange.recover(), TransportError);
          return;
        }
        EXPECT_THROW(exchange.dispatch(batch.input()), TransportError);
        EXPECT_EQ(exchange.recover(), (std::vector<int>{0, 1}));
        expect_living_sums(exchange, batch, {true, true, true, true, false, false});
        if (++recovered == 2) others_done = true;
      },
      1000);
  EXPECT_EQ(recovered, 2);
}

}  // namespace
}  // namespace tokenyard
