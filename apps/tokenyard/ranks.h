#pragma once
// Running one role on every rank: as threads of this process, as processes under our launcher, or as MPI processes.
// A rank process is this program again, with a hidden first argument.

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "progress.h"
#include "tokenyard/world.h"

namespace tokenyard::cli {

// What a rank does. `settings` is what the command gave; rank 0's return value is the run's result.
using Role = nlohmann::json (*)(const World& world, const nlohmann::json& settings, Progress& progress);

nlohmann::json demo_role(const World& world, const nlohmann::json& settings, Progress& progress);
nlohmann::json bench_role(const World& world, const nlohmann::json& settings, Progress& progress);
nlohmann::json bench_cuda_role(const World& world, const nlohmann::json& settings, Progress& progress);
nlohmann::json bench_collective_role(const World& world, const nlohmann::json& settings, Progress& progress);
nlohmann::json bench_layer_role(const World& world, const nlohmann::json& settings, Progress& progress);
nlohmann::json verify_role(const World& world, const nlohmann::json& settings, Progress& progress);
nlohmann::json topo_role(const World& world, const nlohmann::json& settings, Progress& progress);

enum class Runner { threads, processes, mpirun };
std::string describe(Runner runner);

struct RankRun {
  std::string role;  // "demo", "bench", "bench_cuda", "bench_collective", "bench_layer", "verify", "topo"
  int ranks = 1;
  Runner runner = Runner::processes;
  int timeout_ms = 100'000;
  std::string label;  // of the progress bar
};
// UsageError or Error with one line that names the rank at fault when a rank fails or dies.
nlohmann::json run_on_ranks(const RankRun& run, const nlohmann::json& settings);

// The path of mpirun, or empty when it is not in PATH.
std::string find_mpirun();

// Collective: every rank's value, in rank order.
std::vector<nlohmann::json> gather(const World& world, const nlohmann::json& mine);

// The hidden side.
bool is_rank_process(int argc, char** argv);
int rank_process(int argc, char** argv);

}  // namespace tokenyard::cli
