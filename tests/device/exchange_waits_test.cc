// Who was late is told to who asked, by the kernels that wait: also in graphs, every replay of which adds.

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "device/gpus.h"
#include "device/twin.h"
#include "memory/cuda_graph.h"

namespace tokenyard::device_test {
namespace {

constexpr int kRanks = 3;
constexpr std::chrono::milliseconds kLate{200};
constexpr std::int64_t kLeastNs = 100'000'000;  // of which are surely waited for: the others begin without delay, but when they are run

struct Call {
  const char* name;
  Layout layout = Layout::token_major;
  Mode mode = Mode::throughput;
  Weighting weighting = Weighting::none;
  bool phases = false;
  bool expert_rows = false;  // combine by pull
};

const Call kCalls[] = {
    {.name = "TokenMajor"},
    {.name = "TokenMajorByPull", .expert_rows = true},
    {.name = "ExpertMajorAtSourceInPhases", .layout = Layout::expert_major, .weighting = Weighting::at_source, .phases = true},
    {.name = "RankSlots", .layout = Layout::rank_slots, .mode = Mode::latency},
    {.name = "RankSlotsInPhases", .layout = Layout::rank_slots, .mode = Mode::latency, .phases = true},
    {.name = "ExpertPaddedAtSource", .layout = Layout::expert_padded, .mode = Mode::latency, .weighting = Weighting::at_source},
    {.name = "ExpertPaddedAtExpert", .layout = Layout::expert_padded, .mode = Mode::latency, .weighting = Weighting::at_expert},
};

// One rank with its calls and three tensors of waits, which begin with zeros.
class Waiting {
 public:
  Waiting(World& world, const Call& how)
      : world_(world), how_(how), twin_(world, [&](ExchangeOptions& options) { options.expert_rows = how.expert_rows; }) {
    for (TensorView& waits : waits_) waits = {twin_.batch.reserve(kRanks * sizeof(std::int64_t)), Dtype::int64, {kRanks}};
  }

  void dispatch() { received_ = dispatched({}, waits_[0]); }
  void combine() {
    CombineOptions options{.weighting = how_.weighting};
    if (how_.weighting == Weighting::at_source) options.source_weights = twin_.batch.input().topk_weights;
    options.waits = waits_[1];
    options.stream = stream();
    const ConstTensorView y = received_.rows();
    combined_ = how_.phases ? twin_.device.start_combine(y, received_.handle(), options).finish()
                            : twin_.device.combine(y, received_.handle(), options);
    cached_ = received_.handle();
    received_.release();
  }
  void dispatch_cached() { dispatched(cached_, waits_[2]); }

  // Every rank does it, `late` some time after the others. Then all of it has run.
  void make_late(int late, const std::function<void()>& call) {
    world_.barrier();
    if (world_.rank() == late) std::this_thread::sleep_for(kLate);
    call();
    cuda_check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
    twin_.device.check();
  }

  // What this rank has waited in calls for which `late` came late `times` times.
  void expect_late(int tensor, int late, int times) const {
    exchange_test::Bytes copy;
    const ConstTensorView view = twin_.batch.fetch(waits_[tensor], copy);
    const auto* const waits = view.as<std::int64_t>();
    const int rank = world_.rank();
    EXPECT_EQ(waits[rank], 0) << "rank " << rank << " waited for itself";
    for (int peer = 0; peer < kRanks; ++peer) EXPECT_GE(waits[peer], 0);
    if (rank == late) return;
    EXPECT_GE(waits[late], times * kLeastNs) << "rank " << rank;
    for (int peer = 0; peer < kRanks; ++peer) {
      if (peer == late) continue;
      EXPECT_LT(waits[peer], waits[late] / 2) << "rank " << rank << ", peer " << peer;
    }
  }
  cudaStream_t stream() const { return twin_.batch.stream(); }

 private:
  Received dispatched(const Handle& handle, const TensorView& waits) {
    DispatchOptions options{.layout = how_.layout, .sizing = Sizing::capacity, .mode = how_.mode, .waits = waits, .stream = stream()};
    const DispatchInput input = handle ? twin_.batch.rows_only() : twin_.batch.input();
    if (!how_.phases) return handle ? twin_.device.dispatch(input, handle, options) : twin_.device.dispatch(input, options);
    return handle ? twin_.device.start_dispatch(input, handle, options).finish() : twin_.device.start_dispatch(input, options).finish();
  }

  World& world_;
  const Call& how_;
  Twin twin_;
  TensorView waits_[3];  // of dispatches, combines, cached dispatches
  Received received_;
  Combined combined_;
  Handle cached_;
};

class ExchangeWaits : public OnGpu, public testing::WithParamInterface<Call> {};

TEST_P(ExchangeWaits, NameWhoWasLate) {
  run_ranks(kRanks, [](World& world) {
    Waiting rank(world, GetParam());
    constexpr int kTimes = 2;
    for (int i = 0; i < kTimes; ++i) {
      rank.make_late(2, [&] { rank.dispatch(); });
      rank.make_late(0, [&] { rank.combine(); });
      rank.make_late(1, [&] { rank.dispatch_cached(); });
    }
    rank.expect_late(0, 2, kTimes);
    rank.expect_late(1, 0, kTimes);
    rank.expect_late(2, 1, kTimes);
  });
}

TEST_P(ExchangeWaits, GrowWithEveryReplay) {
  run_ranks(kRanks, [](World& world) {
    Waiting rank(world, GetParam());
    const auto round_trip = [&] {
      rank.dispatch();
      rank.combine();
    };
    rank.make_late(-1, round_trip);  // leaves the memory that a capture must not ask for
    const CudaGraph graph(rank.stream(), round_trip);
    constexpr int kReplays = 3;
    for (int i = 0; i < kReplays; ++i) rank.make_late(1, [&] { graph.launch(); });
    rank.expect_late(0, 1, kReplays);
  });
}

INSTANTIATE_TEST_SUITE_P(Calls, ExchangeWaits, testing::ValuesIn(kCalls), [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace tokenyard::device_test
