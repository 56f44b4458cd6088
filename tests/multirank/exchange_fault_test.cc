// One rank of four is killed, or stopped, in every phase of the exchange: the others learn which, where and in time.
//
// The victim ends in the middle of a phase by a trap: a tensor without access rights, whose first read or write by the library
// raises SIGSEGV, and the handler kills or stops the process there.

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "multirank/exchange_processes.h"
#include "multirank/exchange_small.h"
#include "multirank/victim.h"

namespace tokenyard::exchange_test {
namespace {

constexpr int kRanks = 4;
constexpr int kVictim = 2;
constexpr int kStopTimeoutMs = 800;  // of the exchange, when the victim is stopped
constexpr std::int64_t kMs = 1'000'000;

// Memory whose first use by anybody ends this process.
void* trap(std::size_t bytes) {
  struct sigaction action = {};
  action.sa_handler = [](int) { end_here(); };
  sigaction(SIGSEGV, &action, nullptr);
  return mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

using Tokens = SmallTokens<float>;

struct Rank {
  Exchange& exchange;
  Tokens tokens;
  bool victim;
};

// What happens after a good dispatch and combine. The victim does not return; survivors throw.
struct Scenario {
  const char* name;
  Phase phase;  // where survivors must be
  void (*run)(Rank& rank);
};

ConstTensorView trap_rows(const ConstTensorView& like) {
  ConstTensorView view = like;
  view.data = trap(1 << 16);
  return view;
}

TensorView trap_out(const Rank& rank) { return {trap(1 << 16), Dtype::float32, {rank.tokens.tokens, kSmallHidden}}; }

void in_counts(Rank& rank) {
  if (rank.victim) end_here();
  rank.exchange.dispatch(rank.tokens.input());
}

void in_rows(Rank& rank) {
  DispatchInput input = rank.tokens.input();
  if (rank.victim) input.rows = trap_rows(input.rows);
  rank.exchange.dispatch(input);
}

void in_latency_rows(Rank& rank) {
  if (rank.victim) end_here();
  rank.exchange.dispatch(rank.tokens.input(), {.sizing = Sizing::capacity, .mode = Mode::latency});
}

void in_credit(Rank& rank) {
  const DispatchOptions latency{.layout = Layout::rank_slots, .sizing = Sizing::capacity, .mode = Mode::latency};
  const Received first = rank.exchange.dispatch(rank.tokens.input(), latency);
  const Received second = rank.exchange.dispatch(rank.tokens.input(), latency);
  if (rank.victim) end_here();  // with all its buffers leased
  const_cast<Received&>(first).release();
  rank.exchange.dispatch(rank.tokens.input(), latency);
}

void in_weights(Rank& rank) {
  const Received received = rank.exchange.dispatch(rank.tokens.input(), {.layout = Layout::expert_major});
  if (rank.victim) end_here();
  const TensorView weights(rank.tokens.weights.data(), Dtype::float32, {rank.tokens.tokens, kSmallTopK});
  rank.exchange.combine(received.rows(), received.handle(), {.weighting = Weighting::at_source, .source_weights = weights});
}

void in_fold(Rank& rank) {
  const Received received = rank.exchange.dispatch(rank.tokens.input(), {.layout = Layout::expert_major});
  rank.exchange.combine(rank.victim ? trap_rows(received.rows()) : received.rows(), received.handle());
}

// The victim has sent its partial sums and reads those of the others when it ends; the next combine needs its staging slots.
void in_combine_credit(Rank& rank) {
  const Received received = rank.exchange.dispatch(rank.tokens.input());
  CombineOptions options;
  if (rank.victim) options.out = trap_out(rank);
  rank.exchange.combine(received.rows(), received.handle(), options);
  rank.exchange.combine(received.rows(), received.handle());
}

// The same, reading from the memory of others: who wants to write there again waits for it.
void in_read(Rank& rank) {
  const Received received = rank.exchange.dispatch(rank.tokens.input());
  const TensorView y = rank.exchange.expert_rows(received.handle(), Dtype::float32, kSmallHidden);
  std::memset(y.data, 0, y.num_elements() * sizeof(float));
  CombineOptions options;
  if (rank.victim) options.out = trap_out(rank);
  rank.exchange.combine(y, received.handle(), options);
  rank.exchange.expert_rows(received.handle(), Dtype::float32, kSmallHidden);
}

const Scenario kScenarios[] = {
    {"counts", Phase::dispatch_counts, in_counts},
    {"rows", Phase::dispatch_rows, in_rows},
    {"latency_rows", Phase::dispatch_rows, in_latency_rows},
    {"credit", Phase::dispatch_credit, in_credit},
    {"weights", Phase::combine_weights, in_weights},
    {"fold", Phase::combine_rows, in_fold},
    {"combine_credit", Phase::combine_credit, in_combine_credit},
    {"read", Phase::combine_read, in_read},
};

void expect_report(const Failure& failure, const Scenario& scenario, std::int64_t waited_ms) {
  EXPECT_EQ(failure.peer, kVictim) << failure.message();
  EXPECT_EQ(name(failure.phase), name(scenario.phase)) << failure.message();
  if (end_signal == SIGKILL) {
    EXPECT_EQ(failure.kind, FailureKind::peer_lost) << failure.message();
    EXPECT_LT(waited_ms, 2000) << failure.message();
  } else {
    EXPECT_EQ(failure.kind, FailureKind::timeout) << failure.message();
    EXPECT_LT(waited_ms, kStopTimeoutMs + 1000) << failure.message();
  }
}

// argument: scenario, signal, path of the scoreboard.
void fault(World& world, const std::string& argument) {
  std::istringstream words(argument);
  std::string which, path;
  words >> which >> end_signal >> path;
  map_scoreboard(path);
  const Scenario* scenario = std::find_if(std::begin(kScenarios), std::end(kScenarios), [&](const Scenario& s) { return which == s.name; });
  ExchangeOptions options = small_options();
  options.expert_rows = true;
  if (end_signal == SIGSTOP) options.timeout_ms = kStopTimeoutMs;
  Exchange exchange(world, options);
  exchange.add(small_placement(kRanks));
  Rank rank{exchange, Tokens(world.rank(), 1), world.rank() == kVictim};
  {
    const Received received = exchange.dispatch(rank.tokens.input());
    exchange.combine(received.rows(), received.handle());
  }
  try {
    scenario->run(rank);
    ADD_FAILURE() << "rank " << world.rank() << " noticed nothing";
  } catch (const TransportError& error) {
    expect_report(error.failure(), *scenario, (now_ns() - scoreboard->ended_ns.load()) / kMs);
    EXPECT_THROW(exchange.check(), TransportError);
  }
  report_done(kRanks - 1);
}
const RegisterBody kFault("fault", fault);

std::int64_t entries(const char* folder) {
  return std::distance(std::filesystem::directory_iterator(folder), std::filesystem::directory_iterator());
}

// Unix sockets that one of these processes still has bound: their names tell whose they are. Other tests run meanwhile.
std::int64_t sockets_of(const std::vector<int>& pids) {
  std::ifstream table("/proc/net/unix");
  std::int64_t count = 0;
  for (std::string line; std::getline(table, line);) {
    for (const int pid : pids) count += line.find("tokenyard-" + std::to_string(pid) + "-") != std::string::npos ? 1 : 0;
  }
  return count;
}

class ExchangeFault : public testing::TestWithParam<std::tuple<int, const Scenario*>> {};

TEST_P(ExchangeFault, SurvivorsNameTheVictim) {
  const auto [signal, scenario] = GetParam();
  const std::string path = testing::TempDir() + "exchange_fault." + std::to_string(getpid());
  const std::int64_t descriptors = entries("/proc/self/fd");
  std::vector<int> pids(kRanks);
  ProcessRun run{.body = "fault", .argument = std::string(scenario->name) + " " + std::to_string(signal) + " " + path, .ranks = kRanks};
  run.on_start = [&](int rank, int pid) { pids[rank] = pid; };
  for (const RankExit& exit : run_processes(run)) {
    EXPECT_EQ(exit.exit_code, exit.rank == kVictim ? 128 + SIGKILL : 0) << "rank " << exit.rank;
  }
  std::filesystem::remove(path);
  for (const int pid : pids) EXPECT_NE(kill(pid, 0), 0) << "process " << pid << " is still there";
  EXPECT_EQ(entries("/proc/self/fd"), descriptors);
  EXPECT_EQ(sockets_of(pids), 0);
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    EXPECT_EQ(entry.path().filename().string().find("tokenyard"), std::string::npos) << entry.path();
  }
}

std::vector<const Scenario*> scenarios() {
  std::vector<const Scenario*> list;
  for (const Scenario& scenario : kScenarios) list.push_back(&scenario);
  return list;
}

INSTANTIATE_TEST_SUITE_P(Phases, ExchangeFault, testing::Combine(testing::Values(SIGKILL, SIGSTOP), testing::ValuesIn(scenarios())),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param) == SIGKILL ? "Kill_" : "Stop_") + std::get<1>(info.param)->name;
                         });

}  // namespace
}  // namespace tokenyard::exchange_test
