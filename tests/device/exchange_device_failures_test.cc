// Ranks that die, stop, come late, refuse a call or make another one, on GPUs: the others learn which and where, and in time; their
// CUDA context goes on, and so does the exchange, after clear() or recover().

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <sstream>

#include "device/batch.h"
#include "device/gpus.h"
#include "device/hold.h"
#include "multirank/exchange_processes.h"
#include "multirank/exchange_rejection.h"
#include "multirank/victim.h"
#include "multirank/world_failures.h"

namespace tokenyard::device_test {
namespace {

using namespace exchange_test;
using world_test::comes_true;
using world_test::failure_of;
using world_test::Stopwatch;

constexpr int kDeadlineMs = 2000;  // of the exchange, where it is waited for
constexpr int kSoonMs = 1500;      // to notice a death, with a deadline of more than twice that
constexpr int kMarginMs = 2000;    // on top of a deadline

// A rank with its tokens, its exchange, and a dispatch of each kind behind it.
class Rank {
 public:
  explicit Rank(const World& world, int timeout_ms = 5'000) : batch(world), exchange(world, options(timeout_ms)) {
    exchange.add(batch.placement());
    batch.draw(1);
    expert_major = dispatch({.layout = Layout::expert_major, .sizing = Sizing::capacity});
    token_major = dispatch({.sizing = Sizing::capacity});
    rank_slots = dispatch({.layout = Layout::rank_slots, .sizing = Sizing::capacity, .mode = Mode::latency});
    settle();
  }

  Received dispatch(DispatchOptions options) {
    options.stream = batch.stream();
    return exchange.dispatch(batch.input(), options);
  }
  Combined combine(const Received& received, CombineOptions options = {}) {
    options.stream = batch.stream();
    return exchange.combine(received.rows(), received.handle(), options);
  }
  // Until the GPU is done; throws what became of the calls.
  void settle() {
    cuda_check(cudaStreamSynchronize(batch.stream()), "waiting for the rank's stream");
    exchange.check();
  }

  Batch batch;
  Exchange exchange;
  Received expert_major, token_major, rank_slots;

 private:
  ExchangeOptions options(int timeout_ms) const {
    ExchangeOptions options = batch.options();
    options.expert_rows = true;  // token_major and rank_slots are combined by pull, expert_major by push
    options.depth = 4;
    options.timeout_ms = timeout_ms;
    return options;
  }
};

// Dispatch and combine bring back what the experts that live make of every token.
void expect_sums(Rank& rank, const std::vector<bool>& lives) {
  const Received received = rank.dispatch({.layout = Layout::expert_major, .sizing = Sizing::capacity});
  const Combined combined = rank.combine(received);
  Bytes copy;
  const auto* const got = rank.batch.fetch(combined.out, copy).as<float>();
  const std::vector<float> wanted = rank.batch.sums(lives);
  for (std::size_t i = 0; i < wanted.size(); ++i) ASSERT_EQ(got[i], wanted[i]) << "element " << i;
  rank.settle();
}
void expect_sums(Rank& rank) { expect_sums(rank, std::vector<bool>(rank.batch.shape().experts, true)); }

void expect_context_works(const Rank& rank) {
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  launch_fill(1'000, rank.batch.stream());
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(rank.batch.stream()), cudaSuccess);
}

// A call that a rank does not make, and where the others wait for it.
struct MissedCall {
  const char* name;
  Phase phase;
  void (*make)(Rank& rank);
};

const MissedCall kMissedCalls[] = {
    {"Dispatch", Phase::dispatch_counts, [](Rank& rank) { rank.dispatch({.sizing = Sizing::capacity}); }},
    {"ExactDispatch", Phase::dispatch_counts, [](Rank& rank) { rank.dispatch({}); }},
    {"DispatchWithALayoutBeside", Phase::dispatch_counts,
     [](Rank& rank) { rank.dispatch({.sizing = Sizing::capacity, .gather_map = true}); }},
    {"LatencyDispatch", Phase::dispatch_credit,
     [](Rank& rank) { rank.dispatch({.layout = Layout::rank_slots, .sizing = Sizing::capacity, .mode = Mode::latency}); }},
    {"CachedDispatch", Phase::dispatch_credit,
     [](Rank& rank) { rank.exchange.dispatch(rank.batch.rows_only(), rank.token_major.handle(), {.stream = rank.batch.stream()}); }},
    {"Combine", Phase::combine_credit, [](Rank& rank) { rank.combine(rank.expert_major); }},
    {"CombineAtSource", Phase::combine_credit,
     [](Rank& rank) {
       rank.combine(rank.expert_major, {.weighting = Weighting::at_source, .source_weights = rank.batch.input().topk_weights});
     }},
    {"CombineByPull", Phase::combine_credit, [](Rank& rank) { rank.combine(rank.token_major); }},
    {"LatencyCombine", Phase::combine_credit, [](Rank& rank) { rank.combine(rank.rank_slots); }},
};

void expect_failure(const Failure& failure, FailureKind kind, int rank, int peer, Phase phase) {
  EXPECT_EQ(name(failure.kind), name(kind)) << failure.message();
  EXPECT_EQ(failure.rank, rank) << failure.message();
  EXPECT_EQ(failure.peer, peer) << failure.message();
  EXPECT_EQ(name(failure.phase), name(phase)) << failure.message();
}

// ---- rank threads ----

class MissedByAThread : public OnGpu, public testing::WithParamInterface<MissedCall> {};

TEST_P(MissedByAThread, IsNamedAtTheDeadlineAndCleared) {
  constexpr int kAbsent = 2;
  run_ranks(3, [&](World& world) {
    Rank rank(world, kDeadlineMs);
    if (world.rank() != kAbsent) {
      const Stopwatch watch;
      const auto call = [&] {
        GetParam().make(rank);
        rank.settle();
      };
      const Failure failure = failure_of(call);
      EXPECT_GE(watch.ms() + 50, kDeadlineMs);
      EXPECT_LT(watch.ms(), kDeadlineMs + kMarginMs);
      expect_failure(failure, FailureKind::timeout, world.rank(), kAbsent, GetParam().phase);
      expect_context_works(rank);
      // Sticky: told again, and no wait.
      EXPECT_EQ(failure_of([&] { rank.exchange.check(); }).peer, kAbsent);
      EXPECT_EQ(failure_of([&] { rank.dispatch({}); }).peer, kAbsent);
      ASSERT_TRUE(rank.exchange.status().failure);
      EXPECT_EQ(rank.exchange.status().failure->peer, kAbsent);
    }
    world.barrier();
    rank.exchange.clear();
    EXPECT_FALSE(rank.exchange.status().failure);
    rank.batch.draw(2);
    expect_sums(rank);
  });
}

INSTANTIATE_TEST_SUITE_P(Calls, MissedByAThread, testing::ValuesIn(kMissedCalls), [](const auto& info) { return info.param.name; });

class DeviceFailures : public OnGpu {};

TEST_F(DeviceFailures, ARejectedCallFailsOnAllAndTheNextOneWorks) {
  constexpr int kCulprit = 1;
  run_ranks(3, [](World& world) {
    Rank rank(world);
    for (const MissedCall& call : kMissedCalls) {
      const auto good = [&] {
        call.make(rank);
        rank.settle();
      };
      const bool is_dispatch = call.phase != Phase::combine_credit;
      const auto bad = [&] {
        if (is_dispatch) {
          rank.dispatch({.alignment = 3});
        } else {
          CombineOptions options;
          options.bias0 = rank.batch.rows_only().rows;
          options.bias0.shape[1] = 3;
          rank.combine(rank.expert_major, options);
        }
      };
      SCOPED_TRACE(call.name);
      for (int twice = 0; twice < 2; ++twice) {
        expect_rejection(world, kCulprit, is_dispatch ? "alignment = 3" : "bias0 is [24, 3]", good, bad);
      }
      ASSERT_NO_THROW(good());
      expect_sums(rank);
    }
    expect_context_works(rank);
  });
}

TEST_F(DeviceFailures, AllRanksMayRejectACall) {
  run_ranks(3, [](World& world) {
    Rank rank(world);
    for (int i = 0; i < 20; ++i) expect_usage_error("alignment = 3", [&] { rank.dispatch({.alignment = 3}); });
    expect_sums(rank);
  });
}

// What `spoil` does to the batch of the culprit is found by its kernels: it says what, the others say who.
void expect_bad_value(World& world, const std::string& text, void (*spoil)(Batch& batch)) {
  constexpr int kCulprit = 1;
  Rank rank(world);
  for (const MissedCall& call : {kMissedCalls[0], kMissedCalls[1], kMissedCalls[2]}) {
    SCOPED_TRACE(call.name);
    rank.batch.draw(3);
    if (world.rank() == kCulprit) spoil(rank.batch);
    const Failure failure = failure_of([&] {
      call.make(rank);
      rank.settle();
    });
    expect_failure(failure, FailureKind::mismatch, world.rank(), kCulprit, Phase::dispatch_counts);
    const std::string wanted = world.rank() == kCulprit ? text : "rank 1 has stopped with this failure";
    EXPECT_NE(failure.detail.find(wanted), std::string::npos) << failure.message();
    EXPECT_THROW(rank.exchange.check(), TransportError);  // sticky
    EXPECT_THROW(rank.combine(rank.expert_major), TransportError);
    rank.exchange.clear();
    rank.batch.draw(4);
    ASSERT_NO_FATAL_FAILURE(expect_sums(rank));
  }
}

TEST_F(DeviceFailures, AnIdOutOfRangeIsNamedAndSticky) {
  run_ranks(3, [](World& world) {
    expect_bad_value(world, "topk_ids has the id 8 but the placement has 8 experts", [](Batch& batch) { batch.set_id(5, 1, 8); });
  });
}

TEST_F(DeviceFailures, AWeightThatIsNotFiniteIsNamedAndSticky) {
  run_ranks(3, [](World& world) {
    expect_bad_value(world, "topk_weights of token 5 has a weight that is not finite",
                     [](Batch& batch) { batch.set_weight(5, 1, std::numeric_limits<float>::quiet_NaN()); });
  });
}

TEST_F(DeviceFailures, WithoutValidateHighIdsAreCountedAndNoExpert) {
  run_ranks(2, [](World& world) {
    Batch batch(world);
    ExchangeOptions options = batch.options();
    options.validate = false;
    Exchange exchange(world, options);
    exchange.add(batch.placement());
    batch.set_id(2, 0, 8);
    batch.set_id(3, 1, std::int64_t{1} << 40);
    exchange.dispatch(batch.input(), {.stream = batch.stream()});
    EXPECT_EQ(exchange.status().invalid_ids, 2);
    EXPECT_NO_THROW(exchange.check());
  });
}

// Rows of one rank against receive_rows: met exactly, then exceeded by one.
TEST_F(DeviceFailures, OverflowByOneIsStickyEverywhereUntilCleared) {
  for (const Sizing sizing : {Sizing::exact, Sizing::capacity}) {
    run_ranks(3, [&](World& world) {
      Batch batch(world);
      ExchangeOptions options = batch.options();
      options.receive_rows = 30;
      Exchange exchange(world, options);
      const std::vector<Replica> on_the_last{{.shard_ranks = {2}}};
      exchange.add(Placement::custom(3, std::vector<std::vector<Replica>>(batch.shape().experts, on_the_last)));
      const auto dispatch = [&](std::int64_t tokens) {
        batch.draw(5, tokens);
        const Received received = exchange.dispatch(batch.input(), {.sizing = sizing, .stream = batch.stream()});
        Bytes copy;
        const std::int32_t rows = *batch.fetch(received.num_rows_device(), copy).as<std::int32_t>();
        exchange.check();
        return rows;
      };
      const int fits = world.rank() == 2 ? 30 : 0;
      for (int repeat = 0; repeat < 2; ++repeat) {
        EXPECT_EQ(dispatch(10), fits);
        for (const std::int64_t tokens : {world.rank() == 0 ? 11 : 10, 10}) {
          const Failure failure = failure_of([&] { dispatch(tokens); });
          expect_failure(failure, FailureKind::overflow, world.rank(), 2, Phase::dispatch_counts);
          EXPECT_EQ(failure.expected, 30) << failure.message();
          EXPECT_EQ(failure.seen, 31) << failure.message();
        }
        EXPECT_THROW(exchange.check(), TransportError);
        exchange.clear();
      }
      EXPECT_EQ(dispatch(10), fits);
    });
  }
}

// In latency mode only the rank that receives too many rows knows it; the others learn of it in the next call at the latest.
void expect_overflow_in_latency_mode(Layout layout, std::int64_t expert_capacity, std::int64_t max_expert_rows) {
  run_ranks(3, [&](World& world) {
    Batch batch(world);
    ExchangeOptions options = batch.options();
    options.max_expert_rows = max_expert_rows;
    Exchange exchange(world, options);
    const std::vector<Replica> on_the_last{{.shard_ranks = {2}}};
    exchange.add(Placement::custom(3, std::vector<std::vector<Replica>>(batch.shape().experts, on_the_last)));
    const auto dispatch = [&](std::int64_t tokens) {
      batch.draw(5, tokens);
      for (std::int64_t token = 0; token < tokens; ++token) {
        for (int k = 0; k < batch.shape().top_k; ++k) batch.set_id(token, k, 2 * k);
      }
      const Received received = exchange.dispatch(batch.input(), {.layout = layout,
                                                                  .sizing = Sizing::capacity,
                                                                  .mode = Mode::latency,
                                                                  .expert_capacity = expert_capacity,
                                                                  .stream = batch.stream()});
      Bytes copy;
      const std::int32_t rows = *batch.fetch(received.num_rows_device(), copy).as<std::int32_t>();
      exchange.check();
      return rows;
    };
    const int top_k = batch.shape().top_k;
    EXPECT_EQ(dispatch(10), world.rank() == 2 ? 30 * top_k : 0);
    const std::int64_t tokens = world.rank() == 0 ? 11 : 10;
    const Failure failure = failure_of([&] {
      dispatch(tokens);
      if (world.rank() != 2) dispatch(tokens);
    });
    expect_failure(failure, FailureKind::overflow, world.rank(), 2, Phase::dispatch_rows);
    if (world.rank() != 2) return;
    const int counted = expert_capacity > 0 ? 1 : top_k;  // rows of an expert, or of all
    EXPECT_EQ(failure.expected, 30 * counted) << failure.message();
    EXPECT_EQ(failure.seen, 31 * counted) << failure.message();
  });
}

TEST_F(DeviceFailures, OverflowOfAPaddedGroupInLatencyMode) { expect_overflow_in_latency_mode(Layout::expert_padded, 30, 0); }

TEST_F(DeviceFailures, OverflowOfAGroupOfExpertMajorInLatencyMode) { expect_overflow_in_latency_mode(Layout::expert_major, 30, 0); }

TEST_F(DeviceFailures, MoreRowsThanExpertMajorHasRoomForInLatencyMode) {
  expect_overflow_in_latency_mode(Layout::expert_major, 0, 30 * BatchShape().top_k);
}

// A call of rank 0, and what the others do instead: both are named on every rank.
struct Mismatch {
  std::string first, second;
  void (*make)(Rank& rank, bool is_first);
};

TEST_F(DeviceFailures, DifferentCallsAreAMismatchThatNamesBoth) {
  using D = DispatchOptions;
  const Mismatch mismatches[] = {
      {"token_major", "expert_major",
       [](Rank& rank, bool first) {
         rank.dispatch({.layout = first ? Layout::token_major : Layout::expert_major, .sizing = Sizing::capacity});
       }},
      {"throughput", "latency",
       [](Rank& rank, bool first) { rank.dispatch({.sizing = Sizing::capacity, .mode = first ? Mode::throughput : Mode::latency}); }},
      {"dispatch call", "combine call",
       [](Rank& rank, bool first) {
         if (first)
           rank.dispatch({.sizing = Sizing::capacity});
         else
           rank.combine(rank.expert_major);
       }},
      {"handle of call 1", "handle of call 2",
       [](Rank& rank, bool first) {
         const Handle handle = (first ? rank.expert_major : rank.token_major).handle();
         rank.exchange.dispatch(rank.batch.rows_only(), handle, D{.stream = rank.batch.stream()});
       }},
  };
  run_ranks(2, [&](World& world) {
    Rank rank(world);
    for (const Mismatch& mismatch : mismatches) {
      for (const bool swapped : {false, true}) {
        SCOPED_TRACE(mismatch.first + " against " + mismatch.second);
        const Failure failure = failure_of([&] {
          mismatch.make(rank, (world.rank() == 0) != swapped);
          rank.settle();
        });
        EXPECT_EQ(name(failure.kind), name(FailureKind::mismatch)) << failure.message();
        EXPECT_EQ(failure.peer, 1 - world.rank()) << failure.message();
        EXPECT_NE(failure.detail.find(mismatch.first), std::string::npos) << failure.message();
        EXPECT_NE(failure.detail.find(mismatch.second), std::string::npos) << failure.message();
        rank.exchange.clear();
        ASSERT_NO_FATAL_FAILURE(expect_sums(rank));
      }
    }
  });
}

std::vector<bool> living_without(const Placement& placement, int victim) {
  std::vector<bool> lives(placement.num_experts(), true);
  for (const int expert : placement.local_experts(victim)) lives[expert] = false;
  return lives;
}

// After peers have failed: the smaller world works, and knows nothing of handles from before.
void expect_recovery(Rank& rank, int victim) {
  const int former_rank = rank.exchange.world().rank();
  const Handle before = rank.token_major.handle();
  const std::vector<bool> lives = living_without(rank.batch.placement(), victim);
  const std::vector<int> former = rank.exchange.recover();
  ASSERT_EQ(former.size(), 2U);
  EXPECT_EQ(former[rank.exchange.world().rank()], former_rank);
  EXPECT_FALSE(rank.exchange.status().failure);
  for (unsigned round = 0; round < 3; ++round) {
    rank.batch.draw(10 + round);
    ASSERT_NO_FATAL_FAILURE(expect_sums(rank, lives));
  }
  EXPECT_GT(rank.exchange.status().lost_ids, 0);
  const DispatchOptions options{.stream = rank.batch.stream()};
  expect_usage_error("another exchange", [&] { rank.exchange.dispatch(rank.batch.rows_only(), before, options); });
  expect_sums(rank, lives);
}

TEST_F(DeviceFailures, SurvivingThreadsRecover) {
  std::atomic<int> recovered{0};
  for (const int victim : {1, 0}) {
    const auto rank_main = [&](World& world) {
      Rank rank(world);
      expect_sums(rank);
      world.barrier();
      if (world.rank() == victim) throw Error("gone on purpose");
      // Freeing the memory of the one that goes may wait for kernels on its GPU, so none of them waits for it yet.
      ASSERT_TRUE(comes_true(5'000, [&] { return !world.alive(victim); }));
      const Failure failure = failure_of([&] {
        rank.dispatch({.sizing = Sizing::capacity});
        rank.settle();
      });
      expect_failure(failure, FailureKind::peer_lost, world.rank(), victim, Phase::dispatch_counts);
      expect_context_works(rank);
      expect_recovery(rank, victim);
      ++recovered;
    };
    EXPECT_THROW(run_ranks(3, rank_main, 10'000), Error);
  }
  EXPECT_EQ(recovered, 4);
}

// ---- rank processes, of which the last one is killed or stopped ----

struct Fault {
  const char* name;
  Phase killed, stopped;  // where the survivor finds out
  // The victim does not return; the survivor throws.
  void (*run)(Rank& rank, bool is_victim);
};

constexpr int kVictim = 1;

void await_end(const Rank& rank) {
  const auto has_ended = [&] { return scoreboard->ended_ns != 0 && (end_signal == SIGSTOP || !rank.exchange.world().alive(kVictim)); };
  EXPECT_TRUE(comes_true(5'000, has_ended));
}

// The victim ends when its kernels wait in the middle of a call for the survivor, which then begins. Those of a process that is only
// stopped run on, so that this call ends well, and the next one does not.
void end_within(const Rank& rank) {
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // they begin soon
  EXPECT_EQ(cudaStreamQuery(rank.batch.stream()), cudaErrorNotReady);
  end_here();
}

void within_dispatch(Rank& rank, bool is_victim, const DispatchOptions& options) {
  const Received received = rank.dispatch(options);
  if (is_victim) end_within(rank);
  rank.settle();
  rank.combine(received);
}

void within_combine(Rank& rank, bool is_victim) {
  rank.combine(rank.expert_major);
  if (is_victim) end_within(rank);
  rank.settle();
  rank.dispatch({.sizing = Sizing::capacity});
}

const Fault kWithin[] = {
    {"WithinDispatch", Phase::dispatch_rows, Phase::combine_credit,
     [](Rank& rank, bool is_victim) { within_dispatch(rank, is_victim, {.sizing = Sizing::capacity}); }},
    {"WithinDispatchWithALayoutBeside", Phase::dispatch_rows, Phase::combine_credit,
     [](Rank& rank, bool is_victim) { within_dispatch(rank, is_victim, {.layout = Layout::expert_major, .sizing = Sizing::capacity}); }},
    {"WithinCombine", Phase::combine_rows, Phase::dispatch_counts, within_combine},
};

// What a survivor sees of `make`.
void expect_report(Rank& rank, Phase phase, const std::function<void()>& make) {
  const Stopwatch watch;
  const Failure failure = failure_of([&] {
    make();
    rank.settle();
  });
  const std::int64_t waited_ms = watch.ms();
  const bool killed = end_signal == SIGKILL;
  expect_failure(failure, killed ? FailureKind::peer_lost : FailureKind::timeout, rank.exchange.world().rank(), kVictim, phase);
  EXPECT_LT(waited_ms, killed ? kSoonMs : kDeadlineMs + kMarginMs) << failure.message();
  expect_context_works(rank);
  EXPECT_THROW(rank.exchange.check(), TransportError);
}

// argument: fault or missed call, signal, path of the scoreboard.
void fault(World& world, const std::string& argument) {
  std::istringstream words(argument);
  std::string which, path;
  words >> which >> end_signal >> path;
  map_scoreboard(path);
  Rank rank(world, end_signal == SIGKILL ? 5'000 : kDeadlineMs);
  const bool is_victim = world.rank() == kVictim;
  expect_sums(rank);
  world.barrier();
  for (const MissedCall& call : kMissedCalls) {
    if (which != call.name) continue;
    if (is_victim) end_here();
    expect_report(rank, call.phase, [&] { call.make(rank); });
  }
  for (const Fault& within : kWithin) {
    if (which != within.name) continue;
    if (is_victim) within.run(rank, true);
    await_end(rank);
    expect_report(rank, end_signal == SIGKILL ? within.killed : within.stopped, [&] { within.run(rank, false); });
  }
  if (which == "Recover") {
    if (is_victim) end_here();
    expect_report(rank, Phase::dispatch_counts, [&] { rank.dispatch({.sizing = Sizing::capacity}); });
    expect_recovery(rank, kVictim);
  }
  report_done(world.size() - 1);
}
const RegisterBody kFault("cuda.fault", fault);

void run_fault(const std::string& which, int signal, int ranks) {
  const std::string path = testing::TempDir() + "device_fault." + std::to_string(getpid());
  ProcessRun run{.body = "cuda.fault", .argument = which + " " + std::to_string(signal) + " " + path, .ranks = ranks};
  run.timeout_ms = 4'000;  // recover() waits that long for one that is only stopped
  run.run_timeout_ms = 40'000;
  for (const RankExit& exit : run_processes(run)) {
    EXPECT_EQ(exit.exit_code, exit.rank == kVictim ? 128 + SIGKILL : 0) << "rank " << exit.rank;
  }
  std::filesystem::remove(path);
}

class DeviceFault : public OnGpu, public testing::WithParamInterface<std::tuple<int, std::string>> {};

TEST_P(DeviceFault, SurvivorsNameTheVictim) {
  const auto [signal, which] = GetParam();
  run_fault(which, signal, which == "Recover" ? 3 : 2);
}

std::vector<std::string> faults() {
  std::vector<std::string> names;
  for (const MissedCall& call : kMissedCalls) names.emplace_back(call.name);
  for (const Fault& within : kWithin) names.emplace_back(within.name);
  names.emplace_back("Recover");
  return names;
}

INSTANTIATE_TEST_SUITE_P(Phases, DeviceFault, testing::Combine(testing::Values(SIGKILL, SIGSTOP), testing::ValuesIn(faults())),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param) == SIGKILL ? "Kill_" : "Stop_") + std::get<1>(info.param);
                         });

}  // namespace
}  // namespace tokenyard::device_test
