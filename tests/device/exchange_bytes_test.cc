// What an exchange on a GPU says of bytes: those it sent to each rank, and those its memory takes.

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "device/gpus.h"
#include "device/twin.h"

namespace tokenyard::device_test {
namespace {

class ExchangeBytes : public OnGpu {};

TEST_F(ExchangeBytes, LinkBytesAreTheHosts) {
  run_ranks(4, [](World& world) {
    Twin twin(world);
    for (const Mode mode : {Mode::throughput, Mode::latency}) {
      for (const Layout layout : {Layout::token_major, Layout::expert_major, Layout::expert_padded, Layout::rank_slots}) {
        if (layout == Layout::rank_slots && mode == Mode::throughput) continue;  // there is no such thing
        const std::string where = fmt::format("{} {}", name(mode), name(layout));
        twin.batch.draw(static_cast<unsigned>(layout));
        DispatchOptions options{.layout = layout, .sizing = Sizing::capacity, .mode = mode, .stream = twin.batch.stream()};
        const CombineOptions combine{.stream = twin.batch.stream()};
        const Received received = twin.device.dispatch(twin.batch.input(), options);
        const Combined combined = twin.device.combine(received.rows(), received.handle(), combine);
        twin.expect_same({received, combined}, twin.expected(options), where);
        EXPECT_EQ(twin.device.link_bytes(), twin.host.link_bytes()) << where;
      }
    }
    EXPECT_GT(twin.device.link_bytes()[static_cast<std::size_t>(1 - world.rank() % 2)], 0);
  });
}

// Device memory comes in pieces of 2 MiB, and some of it is not the exchange's own: words of the caller's stream, say.
TEST_F(ExchangeBytes, MemoryIsWhatThePlanSays) {
  constexpr std::int64_t kRoom = std::int64_t{16} << 20;
  run_ranks(1, [](World& world) {
    Batch batch(world);
    { const Exchange first(world, batch.options()); }  // loads kernels
    ExchangeOptions options = batch.options();
    options.max_tokens_per_rank = 65536;
    options.receive_rows = 65536;
    options.max_row_bytes = 4096;
    options.max_fanout = 1;
    std::int64_t planned = 0;
    for (const MemoryItem& item : Exchange::memory_plan(options, 1).items) {
      if (std::string(item.purpose).find("when first used") == std::string::npos && item.purpose != std::string("handle, each")) {
        planned += item.bytes;
      }
    }
    const std::size_t free = free_on_all_gpus();
    const Exchange exchange(world, options);
    const auto taken = static_cast<std::int64_t>(free - free_on_all_gpus());
    EXPECT_NEAR(static_cast<double>(taken), static_cast<double>(planned), static_cast<double>(kRoom)) << "taken " << taken;
  });
}

}  // namespace
}  // namespace tokenyard::device_test
