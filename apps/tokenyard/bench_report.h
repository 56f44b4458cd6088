#pragma once
// What a benchmark found: figures from samples, as JSON and as a table.

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "settings.h"

namespace tokenyard::cli {

inline constexpr char kBenchFormat[] = "tokenyard-bench-1";

// {"format", "kind": "run", "settings", "machine", "versions", "baseline", "definitions", "figures": {name: {...}}, "samples_us"}.
// Times are microseconds; no_baseline is the reason why there is none, or empty.
nlohmann::json bench_report(const Settings& settings, Runner runner, const std::string& no_baseline, const nlohmann::json& measured);
// What a run, as bench_report gives it, is compared with, and its limit: "MPI" and "memcpy", on GPUs "NCCL" and "link".
std::string baseline_name(const nlohmann::json& run);
std::string limit_name(const nlohmann::json& run);
// What people read.
std::string bench_table(const nlohmann::json& report);

// Reads a file that bench --json or bench sweep --json wrote; UsageError when it is something else. Always a list of runs.
nlohmann::json read_runs(const std::string& path);

}  // namespace tokenyard::cli
