// Who was late is told to who asked: DispatchOptions::waits and CombineOptions::waits.

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "multirank/exchange_rejection.h"
#include "multirank/exchange_small.h"

namespace tokenyard::exchange_test {
namespace {

constexpr int kRanks = 3;
constexpr std::chrono::milliseconds kLate{200};
constexpr std::int64_t kLeastNs = 100'000'000;  // of which are surely waited for: the others begin without delay, but when they are run
constexpr std::int64_t kBefore = 7;             // what is there already

using Waits = std::vector<std::int64_t>;

Waits nothing_yet() { return Waits(kRanks, kBefore); }
TensorView view(Waits& waits) { return {waits.data(), Dtype::int64, {static_cast<std::int64_t>(waits.size())}}; }

// Every rank makes the call, `late` some time after the others.
template <class Call>
void call_late(World& world, int late, Call&& call) {
  world.barrier();
  if (world.rank() == late) std::this_thread::sleep_for(kLate);
  call();
}

// What a rank has waited in `calls` calls for which `late` came late.
void expect_late(const World& world, const Waits& waits, int late, int calls) {
  EXPECT_EQ(waits[world.rank()], kBefore) << "rank " << world.rank() << " waited for itself";
  if (world.rank() == late) return;
  EXPECT_GE(waits[late], kBefore + calls * kLeastNs) << "rank " << world.rank();
  for (int peer = 0; peer < kRanks; ++peer) {
    if (peer == late) continue;
    EXPECT_LT(waits[peer], waits[late]) << "rank " << world.rank() << ", peer " << peer;
  }
}

struct Call {
  const char* name;
  DispatchOptions dispatch;
  Weighting weighting = Weighting::none;
  bool expert_rows = false;
};

const Call kCalls[] = {
    {"Throughput", {}},
    {"ByPull", {}, Weighting::none, true},
    {"AtSource", {.layout = Layout::expert_major}, Weighting::at_source},
    {"Latency", {.layout = Layout::rank_slots, .sizing = Sizing::capacity, .mode = Mode::latency}},
};

class ExchangeWaits : public testing::TestWithParam<Call> {
 protected:
  static Exchange make(World& world) {
    ExchangeOptions options = small_options();
    options.expert_rows = GetParam().expert_rows;
    Exchange exchange(world, options);
    exchange.add(small_placement(kRanks));
    return exchange;
  }
};

TEST_P(ExchangeWaits, NameWhoWasLate) {
  run_ranks(kRanks, [](World& world) {
    const Call& how = GetParam();
    Exchange exchange = make(world);
    const SmallTokens<float> tokens(world.rank(), 1);
    Waits in_dispatch = nothing_yet(), in_cached = nothing_yet(), in_combine = nothing_yet();
    DispatchOptions dispatch = how.dispatch;
    CombineOptions combine{.weighting = how.weighting};
    if (how.weighting == Weighting::at_source) combine.source_weights = tokens.input().topk_weights;
    for (int call = 0; call < 2; ++call) {  // the second one not at once
      dispatch.waits = view(in_dispatch);
      combine.waits = view(in_combine);
      Received received;
      call_late(world, 2, [&] {
        received = call == 0 ? exchange.dispatch(tokens.input(), dispatch) : exchange.start_dispatch(tokens.input(), dispatch).finish();
      });
      const Handle handle = received.handle();
      call_late(world, 0, [&] {
        call == 0 ? exchange.combine(received.rows(), handle, combine) : exchange.start_combine(received.rows(), handle, combine).finish();
      });
      received.release();
      dispatch.waits = view(in_cached);
      call_late(world, 1, [&] { exchange.dispatch(tokens.rows_only(), handle, dispatch); });
    }
    expect_late(world, in_dispatch, 2, 2);
    expect_late(world, in_combine, 0, 2);
    expect_late(world, in_cached, 1, 2);
  });
}

TEST_P(ExchangeWaits, AreWhatTheExchangeHasWaitedMeanwhile) {
  run_ranks(kRanks, [](World& world) {
    Exchange exchange = make(world);
    const SmallTokens<float> tokens(world.rank(), 1);
    Waits in_dispatch(kRanks, 0), in_combine(kRanks, 0);
    const auto round_trip = [&](Waits* dispatched, Waits* combined) {
      DispatchOptions dispatch = GetParam().dispatch;
      CombineOptions combine{.weighting = GetParam().weighting};
      if (combine.weighting == Weighting::at_source) combine.source_weights = tokens.input().topk_weights;
      if (dispatched != nullptr) dispatch.waits = view(*dispatched);
      if (combined != nullptr) combine.waits = view(*combined);
      const Received received = exchange.dispatch(tokens.input(), dispatch);
      exchange.combine(received.rows(), received.handle(), combine);
    };
    round_trip(nullptr, nullptr);  // not asked for, and not told later
    const PeerWaits before = exchange.peer_waits();
    for (int i = 0; i < 20; ++i) round_trip(&in_dispatch, &in_combine);
    const PeerWaits after = exchange.peer_waits();
    for (int peer = 0; peer < kRanks; ++peer) {
      EXPECT_EQ(in_dispatch[peer], after.dispatch[peer] - before.dispatch[peer]);
      EXPECT_EQ(in_combine[peer], after.combine[peer] - before.combine[peer]);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Calls, ExchangeWaits, testing::ValuesIn(kCalls), [](const auto& info) { return info.param.name; });

// The rows of the gradient, and what comes back of the weights, both in one tensor.
TEST(ExchangeWaitsOfGradients, NameWhoWasLate) {
  run_ranks(kRanks, [](World& world) {
    Exchange exchange(world, small_options());
    exchange.add(small_placement(kRanks));
    const SmallTokens<float> tokens(world.rank(), 1);
    const Received received = exchange.dispatch(tokens.input(), {.layout = Layout::expert_major});
    Waits waits = nothing_yet();
    CombineOptions options{.weighting = Weighting::at_expert};
    options.waits = view(waits);
    call_late(world, 1, [&] { exchange.combine_backward(received.handle(), tokens.rows_view(), received.rows(), options); });
    expect_late(world, waits, 1, 1);
  });
}

// Who waited for a rank in vain has waited.
TEST(ExchangeWaitsOfFailures, TellForWhomTheyWaited) {
  run_ranks(kRanks, [](World& world) {
    Exchange exchange(world, small_options());
    exchange.add(small_placement(kRanks));
    const SmallTokens<float> tokens(world.rank(), 1);
    Waits waits = nothing_yet();
    DispatchOptions options;
    options.waits = view(waits);
    call_late(world, 1, [&] {
      if (world.rank() == 1) {
        exchange.abandon("late, and then not at all");
      } else {
        EXPECT_THROW(exchange.dispatch(tokens.input(), options), TransportError);
      }
    });
    if (world.rank() != 1) expect_late(world, waits, 1, 1);
  });
}

}  // namespace
}  // namespace tokenyard::exchange_test
