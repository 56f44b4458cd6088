#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "mpi/mpi_world.h"
#include "multirank/exchange_run.h"
#include "multirank/exchange_small.h"
#include "tokenyard/exchange.h"

namespace tokenyard::mpi_test {
namespace {

using exchange_test::Case;
using exchange_test::CaseData;

// Cases of the direct exchange: the reference is the same, so the bits are.
bool fits(const Case& c) { return c.number(exchange_test::kRanks) <= world().size(); }

// Those that have as many ranks as are here, or fewer; returns how many.
int run_cases(const std::vector<Case>& cases) {
  int count = 0;
  for (const Case& c : cases) {
    if (!fits(c)) continue;
    ++count;
    const int ranks = static_cast<int>(c.number(exchange_test::kRanks));
    CaseData data = make_case_data(c);
    data.options.transport = Transport::mpi;
    auto part = world().split(world().rank() < ranks ? 0 : -1, world().rank());
    if (part) run_rank(data, *part);
  }
  return count;
}

TEST(ExchangeMpi, EveryPairOfFactors) { EXPECT_GT(run_cases(exchange_test::pairwise_cases(1)), world().size() == 1 ? 2 : 20); }

TEST(ExchangeMpi, RandomCases) {
  // Few random cases have one rank: most factors have values that need several.
  constexpr std::size_t kCases = 25;
  std::vector<Case> cases;
  for (std::uint64_t seed = 30'000; cases.size() < kCases; ++seed) {
    if (const Case c = exchange_test::random_case(seed); fits(c)) cases.push_back(c);
  }
  EXPECT_EQ(run_cases(cases), kCases);
}

// An exchange over MPI with one rank's tokens, which all have experts on several ranks.
class SmallExchange {
 public:
  explicit SmallExchange(ExchangeOptions options) : exchange_(world(), over_mpi(std::move(options))), tokens_(world().rank(), 7) {
    exchange_.add(exchange_test::small_placement(world().size()));
  }
  Received dispatch() { return exchange_.dispatch(tokens_.input(), {.layout = Layout::expert_major}); }
  // Identity experts: each token comes back times its number of experts.
  void round_trip() {
    const Received received = dispatch();
    const Combined sums = exchange_.combine(received.rows(), received.handle());
    for (std::size_t i = 0; i < tokens_.rows.size(); ++i) {
      ASSERT_EQ(sums.out.as<float>()[i], static_cast<float>(exchange_test::kSmallTopK) * tokens_.rows[i]) << "element " << i;
    }
  }
  Exchange& operator*() { return exchange_; }
  const exchange_test::SmallTokens<float>& tokens() const { return tokens_; }

 private:
  static ExchangeOptions over_mpi(ExchangeOptions options) {
    options.transport = Transport::mpi;
    return options;
  }
  Exchange exchange_;
  exchange_test::SmallTokens<float> tokens_;
};

Failure failure_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const TransportError& error) {
    return error.failure();
  }
  ADD_FAILURE() << "no TransportError";
  return {};
}

// Rank 2 makes `wrong`, which is refused, the others `right`: they learn why, and the next calls are fine.
void expect_abort(SmallExchange& exchange, const std::function<void()>& wrong, const std::function<void()>& right, const char* reason) {
  if (world().rank() == 2) {
    EXPECT_THROW(wrong(), UsageError);
  } else {
    const Failure failure = failure_of(right);
    EXPECT_EQ(failure.kind, FailureKind::aborted);
    EXPECT_EQ(failure.peer, 2);
    EXPECT_NE(failure.detail.find(reason), std::string::npos) << failure.message();
  }
  exchange.round_trip();
}

TEST(ExchangeMpiFailure, ARefusedCallFailsOnPeersAndTheNextIsFine) {
  SmallExchange exchange(exchange_test::small_options());
  EXPECT_EQ((*exchange).transport(), Transport::mpi);
  exchange.round_trip();
  const Received received = exchange.dispatch();
  DispatchInput no_ids = exchange.tokens().input();
  no_ids.topk_ids = {};
  for (int twice = 0; twice < 2; ++twice) {
    expect_abort(
        exchange, [&] { (*exchange).dispatch(no_ids); }, [&] { exchange.dispatch(); }, "topk_ids");
    const ConstTensorView no_rows;
    expect_abort(
        exchange, [&] { (*exchange).combine(no_rows, received.handle()); },
        [&] { (*exchange).combine(received.rows(), received.handle()); }, "y");
  }
  const Combined sums = (*exchange).combine(received.rows(), received.handle());  // older handles work on
  EXPECT_EQ(sums.out.as<float>()[0], static_cast<float>(exchange_test::kSmallTopK) * exchange.tokens().rows[0]);
}

TEST(ExchangeMpiFailure, AllRanksMayRefuseTheSameCalls) {
  SmallExchange exchange(exchange_test::small_options());
  for (int call = 0; call < 3; ++call) EXPECT_THROW((*exchange).dispatch({}), UsageError);
  exchange.round_trip();
}

TEST(ExchangeMpiFailure, NobodyKnowsForWhomARankWaits) {
  SmallExchange exchange(exchange_test::small_options());
  std::vector<std::int64_t> memory(world().size());
  const TensorView waits(memory.data(), Dtype::int64, {world().size()});
  const Received received = exchange.dispatch();
  DispatchOptions dispatch{.layout = Layout::expert_major};
  dispatch.waits = waits;
  CombineOptions combine;
  combine.waits = waits;
  const char* const reason = "transport = mpi, which does not say for whom a rank waits";
  expect_abort(
      exchange, [&] { (*exchange).dispatch(exchange.tokens().input(), dispatch); }, [&] { exchange.dispatch(); }, reason);
  expect_abort(
      exchange, [&] { (*exchange).combine(received.rows(), received.handle(), combine); },
      [&] { (*exchange).combine(received.rows(), received.handle()); }, reason);
}

TEST(ExchangeMpiFailure, OverflowEndsWithClear) {
  ExchangeOptions options = exchange_test::small_options();
  options.receive_rows = 1;
  SmallExchange exchange(options);
  EXPECT_EQ(failure_of([&] { exchange.dispatch(); }).kind, FailureKind::overflow);
  EXPECT_EQ(failure_of([&] { exchange.dispatch(); }).kind, FailureKind::overflow) << "it is sticky";
  (*exchange).clear();
  exchange_test::SmallTokens<float> few(world().rank(), 7, world().rank() == 1 ? 1 : 0);
  few.ids = {0, 3};
  EXPECT_EQ((*exchange).dispatch(few.input()).num_rows(), world().rank() == 0 || world().rank() == 3 ? 1 : 0);
}

TEST(ExchangeMpiFailure, TheRankThatDidNotComeIsNamedAndClearStartsOver) {
  ExchangeOptions options = exchange_test::small_options();
  options.timeout_ms = 300;
  SmallExchange exchange(options);
  exchange.round_trip();
  if (world().rank() != 1) {
    const Failure failure = failure_of([&] { exchange.dispatch(); });
    EXPECT_EQ(failure.kind, FailureKind::timeout) << failure.message();
    EXPECT_EQ(failure.peer, 1);
    EXPECT_EQ(failure.phase, Phase::dispatch_counts);
  }
  (*exchange).clear();
  exchange.round_trip();
}

TEST(ExchangeMpiFailure, DifferentCallsNameBoth) {
  SmallExchange exchange(exchange_test::small_options());
  const Layout layout = world().rank() == 3 ? Layout::token_major : Layout::expert_major;
  const Failure failure = failure_of([&] { (*exchange).dispatch(exchange.tokens().input(), {.layout = layout}); });
  EXPECT_EQ(failure.kind, FailureKind::mismatch);
  EXPECT_EQ(failure.peer, world().rank() == 3 ? 0 : 3);
  EXPECT_NE(failure.detail.find("token_major"), std::string::npos) << failure.detail;
  EXPECT_NE(failure.detail.find("expert_major"), std::string::npos) << failure.detail;
  (*exchange).clear();
  exchange.round_trip();
}

TEST(ExchangeMpiFailure, DestructionEndsAWait) {
  auto exchange = std::make_unique<SmallExchange>(exchange_test::small_options());
  Pending<Received> pending;
  if (world().rank() == 0) pending = (**exchange).start_dispatch(exchange->tokens().input());
  const auto begin = std::chrono::steady_clock::now();
  exchange.reset();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10)) << "the deadline is 20 s";
  if (pending) {
    EXPECT_EQ(failure_of([&] { pending.finish(); }).kind, FailureKind::system);
  }
  world().barrier();
}

}  // namespace
}  // namespace tokenyard::mpi_test
