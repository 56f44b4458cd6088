// bench compare: two files of bench --json, figure by figure.

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>

#include "bench_report.h"
#include "command.h"
#include "core/usage.h"
#include "table.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

struct CompareCommand {
  std::string before;
  std::string after;
  bool force = false;
  double tolerance = 0.05;
};

// "tokens: 16 and 4096, ..." for the settings that decide what is measured.
std::string different_settings(const json& before, const json& after) {
  std::string text;
  for (const auto& [key, value] : before["settings"].items()) {
    const json other = after["settings"].value(key, json());
    if (key == "iterations" || key == "warmup" || key == "seed" || key == "timeout_ms" || key == "baseline") continue;  // of the method
    if (value != other) text += fmt::format("{}{}: {} and {}", text.empty() ? "" : ", ", key, value.dump(), other.dump());
  }
  return text;
}

// `quotient` > 1: the second file is better.
std::string verdict(double quotient, double tolerance) {
  if (std::abs(quotient - 1) <= tolerance) return "same";
  return quotient > 1 ? "better" : "worse";
}

void compare_runs(const json& before, const json& after, double tolerance) {
  fmt::print("{}\n", describe(settings_from_json(after["settings"])));
  Table table({"", "first", "second", "second / first", "verdict"});
  for (const auto& [name, first] : before["figures"].items()) {
    if (!after["figures"].contains(name)) continue;
    const json& second = after["figures"][name];
    const std::string label = first["label"];
    const double time_ratio = second["median_us"].get<double>() / first["median_us"].get<double>();
    table.add({label + ", median", time_text(first["median_us"]), time_text(second["median_us"]), fmt::format("{:.3f}", time_ratio),
               verdict(1 / time_ratio, tolerance)});
    for (const auto& [key, what] : {std::pair{"ratio_to_limit", limit_name(after)}, std::pair{"ratio_to_baseline", baseline_name(after)}}) {
      if (!first.contains(key) || !second.contains(key)) continue;
      const double ratio = second[key].get<double>() / first[key].get<double>();
      table.add({fmt::format("{}, {} / time", label, what), fmt::format("{:.3f}", first[key].get<double>()),
                 fmt::format("{:.3f}", second[key].get<double>()), fmt::format("{:.3f}", ratio), verdict(ratio, tolerance)});
    }
  }
  fmt::print("{}", table.text());
}

void run_compare(const CompareCommand& command) {
  if (!(command.tolerance >= 0 && command.tolerance < 1)) {
    usage_error("--tolerance {}: a fraction from 0 to below 1 is needed, e.g. 0.05", command.tolerance);
  }
  const json before = read_runs(command.before);
  const json after = read_runs(command.after);
  if (before.size() != after.size()) {
    usage_error("{} has {} runs, {} has {}; compare sweeps over the same ranks and tokens", command.before, before.size(), command.after,
                after.size());
  }
  for (std::size_t i = 0; i < before.size(); ++i) {
    const std::string differences = different_settings(before[i], after[i]);
    if (differences.empty() || command.force) continue;
    usage_error("different settings ({}); measure again with equal ones, or compare with --force", differences);
  }
  for (std::size_t i = 0; i < before.size(); ++i) {
    if (before[i]["machine"] != after[i]["machine"]) {
      fmt::print("note: different machines: compare the ratios to memcpy and MPI, not the times\n");
    }
    compare_runs(before[i], after[i], command.tolerance);
  }
  fmt::print("verdict: of the second file; same: within {:.0f} %\n", 100 * command.tolerance);
}

}  // namespace

void add_bench_compare(CLI::App& bench) {
  CLI::App* app = bench.add_subcommand("compare", "Compare two files of bench --json or bench sweep --json");
  auto command = std::make_shared<CompareCommand>();
  app->add_option("FIRST", command->before, "Written by --json, e.g. before a change")->required();
  app->add_option("SECOND", command->after, "Written by --json, e.g. after it")->required();
  app->add_flag("--force", command->force, "Compare although the settings differ");
  app->add_option("--tolerance", command->tolerance, "Up to this relative difference the verdict is \"same\"")->capture_default_str();
  app->footer(
      "Examples:\n"
      "  tokenyard bench compare before.json after.json\n"
      "  tokenyard bench compare two_ranks.json four_ranks.json --force");
  app->callback([command] { run_compare(*command); });
}

}  // namespace tokenyard::cli
