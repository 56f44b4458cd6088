// Large batches in layouts that are made of what has landed.

#include <gtest/gtest.h>

#include "device/gpus.h"
#include "device/twin.h"

namespace tokenyard::device_test {
namespace {

struct Large {
  const char* name;
  Layout layout = Layout::expert_major;
  Sizing sizing = Sizing::capacity;
  Mode mode = Mode::throughput;
  bool cached = false;
  bool copy_out = false;
  bool quantise = false;
  bool gather_map = false;
  bool in_phases = false;  // on rank 0 alone
  int experts = 8;
};

const Large kLarge[] = {
    {.name = "ExpertMajor"},
    {.name = "ExpertMajorExact", .sizing = Sizing::exact},
    {.name = "ExpertMajorCached", .cached = true},
    {.name = "ExpertMajorQuantised", .quantise = true},
    {.name = "ExpertMajorQuantisedCached", .cached = true, .quantise = true},
    {.name = "ExpertMajorCopied", .sizing = Sizing::exact, .copy_out = true},
    {.name = "ExpertMajorInPhasesOnOneRank", .in_phases = true},
    {.name = "ExpertPadded", .layout = Layout::expert_padded},
    {.name = "ExpertPaddedLatency", .layout = Layout::expert_padded, .mode = Mode::latency},
    {.name = "ExpertPaddedLatencyCopied", .layout = Layout::expert_padded, .mode = Mode::latency, .copy_out = true},
    {.name = "ExpertPaddedLatencyQuantised", .layout = Layout::expert_padded, .mode = Mode::latency, .quantise = true},
    {.name = "ExpertPaddedLatencyInPhasesOnOneRank", .layout = Layout::expert_padded, .mode = Mode::latency, .in_phases = true},
    {.name = "ExpertPaddedLatencyCopiedInPhasesOnOneRank",
     .layout = Layout::expert_padded,
     .mode = Mode::latency,
     .copy_out = true,
     .in_phases = true},
    {.name = "ExpertMajorLatency", .mode = Mode::latency},
    {.name = "ExpertMajorLatencyCopiedInPhasesOnOneRank", .mode = Mode::latency, .copy_out = true, .in_phases = true},
    {.name = "ExpertMajorLatencyQuantised", .mode = Mode::latency, .quantise = true},
    {.name = "ExpertMajorLatencyOfManyExperts", .mode = Mode::latency, .experts = 700},
    {.name = "MoreExpertsThanSharedMemoryHas", .experts = 9000},
    {.name = "GatherMap", .layout = Layout::token_major, .gather_map = true},
    {.name = "GatherMapCopied", .layout = Layout::token_major, .copy_out = true, .gather_map = true},
};

// Several chunks of tokens and of received rows; the fourth rank has none.
constexpr BatchShape kShape{.max_tokens = 640, .hidden_size = 2048};
constexpr std::int64_t kFewer = 311;  // tokens, on each higher rank

Received dispatch(Exchange& device, const DispatchInput& input, const DispatchOptions& options, const Handle& handle, bool in_phases) {
  if (in_phases) return device.start_dispatch(input, options).finish();
  return handle ? device.dispatch(input, handle, options) : device.dispatch(input, options);
}

void run_rank(World& world, const Large& large) {
  BatchShape shape = kShape;
  shape.experts = large.experts;
  Twin twin(
      world, [](ExchangeOptions& options) { options.max_scale_bytes = kShape.hidden_size / 128 * 4; }, shape);
  DispatchOptions options;
  options.layout = large.layout;
  options.sizing = large.sizing;
  options.mode = large.mode;
  options.copy_out = large.copy_out;
  options.gather_map = large.gather_map;
  if (large.quantise) options.quantise = ScaleFormat::float32;
  options.stream = twin.batch.stream();
  Handle on_device, on_host;
  for (unsigned round = 0; round < 3; ++round) {
    if (round == 0 || !large.cached) twin.batch.draw(round, std::max<std::int64_t>(kShape.max_tokens - kFewer * world.rank(), 0));
    const bool along_handle = large.cached && round > 0;
    const DispatchInput input = along_handle ? twin.batch.rows_only() : twin.batch.input();
    const Received received =
        dispatch(twin.device, input, options, along_handle ? on_device : Handle(), large.in_phases && world.rank() == 0);
    DispatchOptions host_options = options;
    host_options.stream = nullptr;
    const Received expected = along_handle ? twin.host.dispatch(twin.batch.rows_only(Device::cpu), on_host, host_options)
                                           : twin.host.dispatch(twin.batch.input(Device::cpu), host_options);
    const std::string where = std::string(large.name) + " round " + std::to_string(round);
    twin.expect_same(received, expected, where);
    if (round == 0) on_device = received.handle();
    if (round == 0) on_host = expected.handle();
  }
}

class ExchangeLarge : public testing::TestWithParam<Large> {
 protected:
  void SetUp() override {
    if (gpu_count() == 0) GTEST_SKIP() << "no GPU here";
  }
};

TEST_P(ExchangeLarge, AreWhatTheHostReceives) {
  for (const int ranks : {1, 2, 3, 4}) {
    run_ranks(
        ranks, [&](World& world) { run_rank(world, GetParam()); }, 20'000);
  }
}

INSTANTIATE_TEST_SUITE_P(Large, ExchangeLarge, testing::ValuesIn(kLarge), [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace tokenyard::device_test
