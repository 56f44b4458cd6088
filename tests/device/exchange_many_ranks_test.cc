// More ranks than a kernel has arenas among its arguments: the others are looked up in memory.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "device/gpus.h"
#include "device/twin.h"
#include "protocol/device_words.h"

namespace tokenyard::device_test {
namespace {

constexpr int kRanks = protocol::kNearRanks + 2;

class ExchangeManyRanks : public OnGpu {};

TEST_F(ExchangeManyRanks, AreWhatTheHostReceives) {
  const DispatchOptions kinds[] = {{.sizing = Sizing::capacity},
                                   {.sizing = Sizing::capacity, .gather_map = true},
                                   {.layout = Layout::expert_major, .sizing = Sizing::capacity},
                                   {.layout = Layout::rank_slots, .sizing = Sizing::capacity, .mode = Mode::latency},
                                   {.layout = Layout::expert_padded, .sizing = Sizing::capacity, .mode = Mode::latency}};
  run_ranks(
      kRanks,
      [&](World& world) {
        Twin twin(world, [](ExchangeOptions& options) { options.expert_rows = true; }, {.experts = 2 * kRanks, .top_k = 6});
        for (unsigned round = 0; round < 2; ++round) {
          for (DispatchOptions options : kinds) {
            twin.batch.draw(round);
            options.stream = twin.batch.stream();
            RoundTrip trip;
            trip.received = twin.device.dispatch(twin.batch.input(), options);
            trip.combined = twin.device.combine(trip.received.rows(), trip.received.handle(), {.stream = options.stream});
            const std::string where = fmt::format("{} round {}", name(options.layout), round);
            twin.expect_same(trip, twin.expected(options), where);
          }
        }
        twin.device.check();
      },
      30'000);
}

}  // namespace
}  // namespace tokenyard::device_test
