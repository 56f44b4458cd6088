// Dispatch and combine in CUDA graphs: replayed with other inputs in the same memory, between eager calls, they do what the calls do.

#include <gtest/gtest.h>

#include "device/gpus.h"
#include "device/twin.h"
#include "memory/cuda_graph.h"
#include "multirank/exchange_rejection.h"

namespace tokenyard::device_test {
namespace {

using exchange_test::expect_usage_error;

constexpr int kReplays = 6;

struct Captured {
  const char* name;
  Layout layout = Layout::token_major;
  Mode mode = Mode::throughput;
  bool cached = false;
  bool phases = false;       // start and finish
  bool expert_rows = false;  // combine by pull
};

const Captured kCaptured[] = {
    {.name = "TokenMajor"},
    {.name = "TokenMajorByPull", .expert_rows = true},
    {.name = "TokenMajorInPhases", .phases = true},
    {.name = "TokenMajorCached", .cached = true},
    {.name = "ExpertMajor", .layout = Layout::expert_major},
    {.name = "ExpertMajorInPhases", .layout = Layout::expert_major, .phases = true},
    {.name = "ExpertMajorCached", .layout = Layout::expert_major, .cached = true},
    {.name = "RankSlots", .layout = Layout::rank_slots, .mode = Mode::latency},
    {.name = "RankSlotsByPull", .layout = Layout::rank_slots, .mode = Mode::latency, .expert_rows = true},
    {.name = "RankSlotsInPhases", .layout = Layout::rank_slots, .mode = Mode::latency, .phases = true},
    {.name = "RankSlotsCached", .layout = Layout::rank_slots, .mode = Mode::latency, .cached = true},
    {.name = "ExpertMajorLatency", .layout = Layout::expert_major, .mode = Mode::latency},
};

// The calls of one rank, eager or captured.
class Calls {
 public:
  Calls(World& world, const Captured& captured)
      : twin_(world,
              [&](ExchangeOptions& options) {
                options.expert_rows = captured.expert_rows;
                options.depth = kDepth;
              }),
        phases_(captured.phases) {
    dispatch_.layout = captured.layout;
    dispatch_.sizing = Sizing::capacity;
    dispatch_.mode = captured.mode;
    dispatch_.stream = twin_.batch.stream();
    combine_.stream = dispatch_.stream;
    if (captured.layout == Layout::expert_major) combine_.weighting = Weighting::at_expert;
    if (captured.cached) {
      routed_ = twin_.device.dispatch(twin_.batch.input(), dispatch_).handle();
      routed_on_host_ = twin_.expected(dispatch_).received.handle();
    }
    // The memory that a capture must not ask for: one call leaves what the next one finds, but expert rows have a buffer each.
    for (int i = 0; i < kDepth; ++i) enqueue();
  }

  RoundTrip enqueue() { return enqueue(routed_); }
  // Along `handle`, unless it is empty.
  RoundTrip enqueue(const Handle& handle) {
    RoundTrip trip;
    trip.received = dispatch(handle);
    const ConstTensorView y = trip.received.rows();
    trip.combined = phases_ ? twin_.device.start_combine(y, trip.received.handle(), combine_).finish()
                            : twin_.device.combine(y, trip.received.handle(), combine_);
    return trip;
  }
  RoundTrip expected() { return twin_.expected(dispatch_, combine_, routed_on_host_ ? &routed_on_host_ : nullptr); }
  RoundTrip expected(const Handle& handle) { return twin_.expected(dispatch_, combine_, &handle); }

  Twin& twin() { return twin_; }
  cudaStream_t stream() const { return twin_.batch.stream(); }

 private:
  static constexpr int kDepth = 4;

  Received dispatch(const Handle& handle) {
    const DispatchInput input = handle ? twin_.batch.rows_only() : twin_.batch.input();
    if (!phases_) return handle ? twin_.device.dispatch(input, handle, dispatch_) : twin_.device.dispatch(input, dispatch_);
    return handle ? twin_.device.start_dispatch(input, handle, dispatch_).finish() : twin_.device.start_dispatch(input, dispatch_).finish();
  }

  Twin twin_;
  bool phases_;
  DispatchOptions dispatch_;
  CombineOptions combine_;
  Handle routed_, routed_on_host_;  // of the cached calls
};

class ExchangeGraph : public OnGpu, public testing::WithParamInterface<Captured> {};

TEST_P(ExchangeGraph, ReplaysFollowTheirInputs) {
  for (const int ranks : {2, 4}) {
    run_ranks(ranks, [](World& world) {
      Calls calls(world, GetParam());
      RoundTrip captured;
      const CudaGraph graph(calls.stream(), [&] { captured = calls.enqueue(); });
      world.barrier();
      for (unsigned replay = 0; replay < kReplays; ++replay) {
        const std::string where = std::to_string(world.size()) + " ranks, replay " + std::to_string(replay);
        Twin& twin = calls.twin();
        twin.batch.draw(100 + replay);
        graph.launch();
        const RoundTrip expected = calls.expected();
        twin.expect_same(captured, expected, where);
        if (replay % 3 == 0) continue;  // two replays in a row
        twin.batch.draw(200 + replay);
        twin.expect_same(calls.enqueue(), calls.expected(), where + ", eager");
        // The handle that was captured is the last replay's.
        const RoundTrip along = calls.enqueue(captured.received.handle());
        twin.expect_same(along.combined, calls.expected(expected.received.handle()).combined, where + ", along its handle");
      }
      calls.twin().device.check();
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Calls, ExchangeGraph, testing::ValuesIn(kCaptured), [](const auto& info) { return info.param.name; });

class ExchangeGraphs : public OnGpu {};

TEST_F(ExchangeGraphs, TwoOfOneExchangeTakeTurns) {
  run_ranks(2, [](World& world) {
    Twin twin(world, [](ExchangeOptions& options) { options.depth = 4; });
    const DispatchOptions token_major{.sizing = Sizing::capacity, .stream = twin.batch.stream()};
    const DispatchOptions rank_slots{
        .layout = Layout::rank_slots, .sizing = Sizing::capacity, .mode = Mode::latency, .stream = twin.batch.stream()};
    const auto enqueue = [&](const DispatchOptions& options) {
      RoundTrip trip;
      trip.received = twin.device.dispatch(twin.batch.input(), options);
      trip.combined = twin.device.combine(trip.received.rows(), trip.received.handle(), {.stream = options.stream});
      return trip;
    };
    std::vector<RoundTrip> before = {enqueue(token_major), enqueue(rank_slots)};  // both at once, as below
    twin.expect_same(before[0], twin.expected(token_major), "before the graphs");
    before.clear();
    RoundTrip first, second;
    const CudaGraph throughput(twin.batch.stream(), [&] { first = enqueue(token_major); });
    const CudaGraph latency(twin.batch.stream(), [&] { second = enqueue(rank_slots); });
    world.barrier();
    for (unsigned i = 0; i < 12; ++i) {
      const bool is_first = i % 2 == 0 || i > 8;  // in turn, then one of them in a row
      twin.batch.draw(300 + i);
      (is_first ? throughput : latency).launch();
      const RoundTrip expected = twin.expected(is_first ? token_major : rank_slots);
      twin.expect_same(is_first ? first : second, expected, "launch " + std::to_string(i));
    }
    twin.device.check();
  });
}

// Launches one behind the other, with nothing in between that waits on the host.
TEST_F(ExchangeGraphs, ManyLaunchesInARow) {
  run_ranks(2, [](World& world) {
    Calls calls(world, {.name = "", .layout = Layout::rank_slots, .mode = Mode::latency});
    RoundTrip captured;
    const CudaGraph graph(calls.stream(), [&] { captured = calls.enqueue(); });
    world.barrier();
    calls.twin().batch.draw(7);
    for (int i = 0; i < 200; ++i) graph.launch();
    calls.twin().expect_same(captured, calls.expected(), "the last launch");
    calls.twin().device.check();
  });
}

// Rank 0 has little to pull and is soon at its next launch, which brings other rows to where rank 1 still pulls from.
TEST_F(ExchangeGraphs, CombinesAloneLeaveRowsUntilPeersHaveReadThem) {
  run_ranks(2, [](World& world) {
    const BatchShape shape{.max_tokens = 2048, .hidden_size = 1024, .experts = 8, .top_k = 2};
    Twin twin(
        world, [](ExchangeOptions& options) { options.expert_rows = true; }, shape);
    const cudaStream_t stream = twin.batch.stream();
    twin.batch.draw(1, world.rank() == 0 ? 1 : shape.max_tokens);
    const DispatchOptions dispatch{.sizing = Sizing::capacity, .stream = stream};
    const Received received = twin.device.dispatch(twin.batch.input(), dispatch);
    const RoundTrip expected = twin.expected(dispatch);
    {
      const auto combine = [&] { return twin.device.combine(received.rows(), received.handle(), {.stream = stream}); };
      const Combined one = combine(), two = combine();  // both at once, as below
    }
    const Received again = twin.device.dispatch(twin.batch.input(), dispatch);  // nothing is left to be read when the capture begins
    TensorView empty = received.rows();
    empty.data = twin.batch.reserve(empty.num_elements() * sizeof(float));
    Combined sums, nothing;
    const CudaGraph graph(stream, [&] { sums = twin.device.combine(received.rows(), received.handle(), {.stream = stream}); });
    const CudaGraph zero(stream, [&] { nothing = twin.device.combine(empty, received.handle(), {.stream = stream}); });
    world.barrier();
    for (int i = 0; i < 20; ++i) {
      graph.launch();
      zero.launch();
      twin.expect_same(sums, expected.combined, "pair " + std::to_string(i));
    }
    twin.device.check();
  });
}

TEST_F(ExchangeGraphs, OneCallBeforeTheCaptureIsEnough) {
  run_ranks(2, [](World& world) {
    Twin twin(world);
    const DispatchOptions options{.layout = Layout::expert_major, .sizing = Sizing::capacity, .stream = twin.batch.stream()};
    const auto enqueue = [&] {
      RoundTrip trip;
      trip.received = twin.device.dispatch(twin.batch.input(), options);
      trip.combined = twin.device.combine(trip.received.rows(), trip.received.handle(), {.stream = options.stream});
      return trip;
    };
    enqueue();
    RoundTrip captured;
    const CudaGraph graph(twin.batch.stream(), [&] { captured = enqueue(); });
    world.barrier();
    graph.launch();
    twin.expect_same(captured, twin.expected(options), "the replay");
  });
}

TEST_F(ExchangeGraphs, ExactSizingIsRefusedWhileCapturing) {
  run_ranks(2, [](World& world) {
    Twin twin(world);
    const cudaStream_t stream = twin.batch.stream();
    const DispatchOptions exact{.stream = stream};
    twin.expect_same(twin.device.dispatch(twin.batch.input(), exact), twin.expected(exact).received, "before");
    const CudaGraph empty(stream, [&] {
      expect_usage_error("sizing = exact while a graph is captured", [&] { twin.device.dispatch(twin.batch.input(), exact); });
      expect_usage_error("use sizing = capacity", [&] { twin.device.start_dispatch(twin.batch.input(), exact); });
    });
    twin.batch.draw(2);
    twin.expect_same(twin.device.dispatch(twin.batch.input(), exact), twin.expected(exact).received, "after");
    Received captured;
    const DispatchOptions capacity{.sizing = Sizing::capacity, .stream = stream};
    twin.device.dispatch(twin.batch.input(), capacity);
    const CudaGraph graph(stream, [&] { captured = twin.device.dispatch(twin.batch.input(), capacity); });
    world.barrier();
    twin.batch.draw(3);
    graph.launch();
    twin.expect_same(captured, twin.expected(capacity).received, "captured");
  });
}

// Nothing has left memory for it, and no eager call gets the memory that replays write to.
TEST_F(ExchangeGraphs, ACaptureAllocatesBesideTheGraph) {
  run_ranks(2, [](World& world) {
    Twin twin(world);
    const DispatchOptions options{.layout = Layout::expert_major, .sizing = Sizing::capacity, .stream = twin.batch.stream()};
    const CudaGraph graph(twin.batch.stream(), [&] {
      const Received gone = twin.device.dispatch(twin.batch.input(), options);
      twin.device.combine(gone.rows(), gone.handle(), {.stream = options.stream});
    });
    world.barrier();
    const Received eager = twin.device.dispatch(twin.batch.input(), options);
    const Received expected = twin.expected(options).received;
    twin.batch.draw(2);
    graph.launch();
    twin.expect_same(eager, expected, "an eager handle, after a replay");
    twin.device.check();
  });
}

}  // namespace
}  // namespace tokenyard::device_test
