#pragma once
// The settings of a benchmark, as the user gives them, and what they mean for the library. `bench`, `bench sweep` and
// `plan-memory` share them.

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "ranks.h"
#include "tokenyard/exchange.h"
#include "workload.h"

namespace CLI {
class App;
}

namespace tokenyard::cli {

struct Settings {
  int ranks = 4;
  std::int64_t tokens = 4096;  // per rank
  std::int64_t hidden_size = 7168;
  int experts = 256;
  int top_k = 8;
  std::string dtype = "bfloat16";
  std::string mode = "throughput";
  std::string layout;  // empty: token_major, in latency mode rank_slots
  std::string sizing;  // empty: exact, in latency mode capacity
  bool gather_map = false;
  std::string placement = "uniform";
  std::string preset;  // a model's experts, top_k, hidden_size and gate
  std::string transport = "automatic";
  std::string device = "cpu";
  int sm_budget = 0;  // cuda
  double skew = 0;
  int threads = 1;
  int depth = 2;
  int iterations = 50;
  int warmup = 5;
  std::int64_t seed = 1;
  int timeout_ms = 100'000;
  bool baseline = true;
  bool trace = false;  // measure phases, too
};

// --ranks, --tokens, --hidden-size, ...: what describes an exchange.
void add_shape_options(CLI::App& app, Settings& settings);
// --transport, --iterations, --skew, ...: what describes a measurement.
void add_run_options(CLI::App& app, Settings& settings);

// UsageError with option, value, reason and remedy for whatever cannot work. Fills in what the preset and the mode imply, and gives every
// name its full spelling.
void complete_shape(CLI::App& app, Settings& settings);
void complete_run(Settings& settings);

// Batches that a measurement rotates through, so that caches do not lie. Each system that is measured reads its own copies of
// them: none finds in its caches what another has just read.
inline constexpr int kInputSets = 2;
enum System { kDirect, kTuned, kPlain, kSystems };

nlohmann::json to_json(const Settings& settings);
Settings settings_from_json(const nlohmann::json& settings);

Workload workload_of(const Settings& settings, int input_set);
// "uniform", "tp:N", "replicated:N" or a file in the format of Placement::from_json.
Placement placement_of(const Settings& settings);
ExchangeOptions exchange_options(const Settings& settings, const Placement& placement);
DispatchOptions dispatch_options(const Settings& settings);
// The weighting that combine uses for the layout: rows of token_major and rank_slots are folded by the caller.
Weighting weighting_of(Layout layout);
bool has_expert_rows(Layout layout);

// Threads for inproc, mpirun where it is needed or wanted, else processes. `no_baseline` receives the reason when there is none.
Runner choose_runner(const Settings& settings, std::string& no_baseline);

// "4 ranks x 4096 tokens x 7168 bfloat16, top-8 of 256 experts (uniform), token_major, throughput, exact"
std::string describe(const Settings& settings);

}  // namespace tokenyard::cli
