// Memory in windows of NCCL: under kernels, with a communicator of its own or a given one, and what cannot be refused with the reason.
// What the exchange and collectives do over it is tested where they are (WindowExchange, DirectOnWindows).

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <optional>

#include "device/batch.h"
#include "device/gpus.h"
#include "device/pattern_run.h"
#include "memory/cuda_handle.h"
#include "memory/nccl_communicator.h"
#include "memory/nccl_window.h"
#include "multirank/exchange_processes.h"
#include "multirank/exchange_rejection.h"
#include "multirank/world_failures.h"

namespace tokenyard::device_test {
namespace {

using exchange_test::expect_usage_error;
using exchange_test::RegisterBody;
using exchange_test::run_processes;
using world_test::comes_true;
using world_test::failure_of;

constexpr std::size_t kBytes = std::size_t{3} << 20;
constexpr int kTimeoutMs = 20'000;

void exchange_patterns(World& world) {
  const auto memory = value_or_throw(create_nccl_window(world, kBytes, {.device = use_gpu_of(world.rank()), .timeout_ms = kTimeoutMs}));
  EXPECT_EQ(memory->transport(), Transport::nccl_window);
  EXPECT_GE(memory->bytes(), kBytes);
  device_test::exchange_patterns(world, *memory, 20);
}

// A rank's exchange, over its own communicator or a given one.
struct Rank {
  explicit Rank(const World& world, void* communicator = nullptr) : batch(world), exchange(world, options(communicator)) {
    exchange.add(batch.placement());
  }
  ExchangeOptions options(void* communicator) const {
    ExchangeOptions options = batch.options();
    options.transport = Transport::nccl_window;
    options.nccl_communicator = communicator;
    options.timeout_ms = kTimeoutMs;
    return options;
  }
  // Dispatch and combine bring back what the experts that live make of every token.
  void expect_sums(unsigned seed, const std::vector<bool>& lives) {
    batch.draw(seed);
    const Received received =
        exchange.dispatch(batch.input(), {.layout = Layout::expert_major, .sizing = Sizing::capacity, .stream = batch.stream()});
    const Combined combined = exchange.combine(received.rows(), received.handle(), {.stream = batch.stream()});
    exchange_test::Bytes copy;
    const auto* const got = batch.fetch(combined.out, copy).as<float>();
    const std::vector<float> wanted = batch.sums(lives);
    for (std::size_t i = 0; i < wanted.size(); ++i) ASSERT_EQ(got[i], wanted[i]) << "element " << i;
    exchange.check();
  }
  void expect_sums(unsigned seed) { expect_sums(seed, std::vector<bool>(batch.shape().experts, true)); }

  Batch batch;
  Exchange exchange;
};

class NcclWindow : public OnWindows {};
class NcclWindows : public OnWindowsOfSeveral {};

TEST_F(NcclWindow, KernelsOfRankThreadsWriteEachOthersMemory) {
  run_ranks(ranks(), [](World& world) { exchange_patterns(world); });
}

const RegisterBody kPatterns("nccl_window.patterns", [](World& world, const std::string&) { exchange_patterns(world); });

TEST_F(NcclWindow, KernelsOfRankProcessesWriteEachOthersMemory) {
  for (const RankExit& exit : run_processes({.body = "nccl_window.patterns", .ranks = ranks()})) {
    EXPECT_EQ(exit.exit_code, 0) << "rank " << exit.rank;
  }
}

TEST_F(NcclWindow, AGivenCommunicatorServesTwoExchangesAndStays) {
  run_ranks(ranks(), [](World& world) {
    const int gpu = use_gpu_of(world.rank());
    const nccl::Communicator given(world, nccl::agree(world, gpu, "", Phase::memory), {.device = gpu, .timeout_ms = kTimeoutMs});
    {
      Rank first(world, given.get());
      Rank second(world, given.get());
      EXPECT_EQ(first.exchange.transport(), Transport::nccl_window);
      for (unsigned seed = 1; seed < 4; ++seed) {
        ASSERT_NO_FATAL_FAILURE(first.expect_sums(seed));
        ASSERT_NO_FATAL_FAILURE(second.expect_sums(seed));
      }
      world.barrier();
    }
    nccl::Result state = nccl::Result::in_progress;
    EXPECT_EQ(given.library().comm_get_async_error(given.get(), &state), nccl::Result::success);
    EXPECT_EQ(state, nccl::Result::success);
    world.barrier();
  });
}

TEST_F(NcclWindows, GivenToOneRankIsAMismatch) {
  run_ranks(2, [](World& world) {
    const int gpu = use_gpu_of(world.rank());
    const nccl::Communicator given(world, nccl::agree(world, gpu, "", Phase::memory), {.device = gpu, .timeout_ms = kTimeoutMs});
    void* const mine = world.rank() == 1 ? given.get() : nullptr;
    const Failure failure = failure_of([&] { const Rank rank(world, mine); });
    EXPECT_EQ(failure.kind, FailureKind::mismatch) << failure.message();
    EXPECT_NE(failure.detail.find("given to rank 1 and not to rank 0"), std::string::npos) << failure.message();
    world.barrier();
  });
}

TEST_F(NcclWindows, ACommunicatorOfOtherRanksIsNamed) {
  run_ranks(2, [](World& world) {
    const int gpu = use_gpu_of(world.rank());
    const auto alone = world.split(world.rank(), 0);
    ASSERT_TRUE(alone.has_value());
    const nccl::Communicator given(*alone, nccl::agree(*alone, gpu, "", Phase::memory), {.device = gpu, .timeout_ms = kTimeoutMs});
    const Failure failure = failure_of([&] { const Rank rank(world, given.get()); });
    EXPECT_NE(failure.detail.find("has rank 0 of 1 here"), std::string::npos) << failure.message();
    world.barrier();
  });
}

TEST_F(NcclWindow, NothingIsLeftOfMemoryThatGoes) {
  constexpr std::size_t kLarge = std::size_t{256} << 20;
  run_ranks(ranks(), [](World& world) {
    const auto cycle = [&] {
      const auto memory = value_or_throw(create_nccl_window(world, kLarge, {.device = use_gpu_of(world.rank()), .timeout_ms = kTimeoutMs}));
      world.barrier();
    };
    cycle();
    world.barrier();
    const std::size_t descriptors = open_descriptors(), free = free_on_all_gpus();
    world.barrier();
    for (int i = 0; i < 4; ++i) cycle();
    world.barrier();
    EXPECT_LE(open_descriptors(), descriptors + 4);
    EXPECT_GE(free_on_all_gpus() + kLarge / 2, free);
    world.barrier();
  });
}

// The last rank is killed while the others' kernels wait for it: they learn it, go on without it, and end.
const RegisterBody kLost("nccl_window.lost", [](World& world, const std::string&) {
  const int victim = world.size() - 1;
  Rank rank(world);
  rank.expect_sums(1);
  world.barrier();
  if (world.rank() == victim) {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    kill(getpid(), SIGKILL);
  }
  const Failure failure = failure_of([&] {
    rank.exchange.dispatch(rank.batch.input(), {.sizing = Sizing::capacity, .stream = rank.batch.stream()});
    cuda_check(cudaStreamSynchronize(rank.batch.stream()), "waiting for a dispatch");
    rank.exchange.check();
  });
  EXPECT_EQ(failure.kind, FailureKind::peer_lost) << failure.message();
  EXPECT_EQ(failure.peer, victim) << failure.message();
  std::vector<bool> lives(rank.batch.shape().experts, true);
  const Placement placement = rank.batch.placement();
  for (const int expert : placement.local_experts(victim)) lives[expert] = false;
  EXPECT_EQ(rank.exchange.recover().size(), static_cast<std::size_t>(victim));
  EXPECT_EQ(rank.exchange.transport(), Transport::nccl_window);
  for (unsigned seed = 2; seed < 5; ++seed) ASSERT_NO_FATAL_FAILURE(rank.expect_sums(seed, lives));
});

TEST_F(NcclWindows, AKilledRankIsNamedAndTheOthersGoOn) {
  const auto exits = run_processes({.body = "nccl_window.lost", .ranks = ranks()});
  for (const RankExit& exit : exits) {
    if (exit.rank + 1 == ranks()) continue;
    EXPECT_EQ(exit.exit_code, 0) << "rank " << exit.rank;
  }
}

TEST_F(NcclWindow, RanksThatShareAGpuAreRefused) {
  run_ranks(2, [](World& world) {
    cuda_check(cudaSetDevice(0), "cudaSetDevice");
    expect_usage_error("ranks 0 and 1 both use GPU",
                       [&] { static_cast<void>(create_nccl_window(world, kBytes, {.timeout_ms = kTimeoutMs})); });
    expect_usage_error("or transport cuda_peer", [&] { static_cast<void>(create_nccl_window(world, kBytes, {.timeout_ms = kTimeoutMs})); });
  });
}

}  // namespace
}  // namespace tokenyard::device_test
