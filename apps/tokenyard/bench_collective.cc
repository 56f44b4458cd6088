// bench collective: all_gather_v and reduce_scatter_v on GPUs, over peer memory and by NCCL.

#include "bench_collective.h"

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "bench_samples.h"
#include "command.h"
#include "core/usage.h"
#include "files.h"
#include "machine.h"
#include "ranks.h"
#include "table.h"
#include "tokenyard/dtype.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

struct CollectiveCommand {
  CollectiveSettings settings;
  std::string json_path;
};

void check(const CollectiveSettings& settings) {
  const auto at_least = [](const char* option, std::int64_t value, std::int64_t least) {
    if (value < least) usage_error("{} is {}; it must be {} or more", option, value, least);
  };
  at_least("--ranks", settings.ranks, 1);
  at_least("--rows", settings.rows, 0);
  at_least("--hidden-size", settings.hidden_size, 1);
  at_least("--iterations", settings.iterations, 1);
  at_least("--warmup", settings.warmup, 0);
  if (!is_summable(parse_dtype(settings.dtype)) || parse_dtype(settings.dtype) == Dtype::float64)
    usage_error("--dtype is {}; use float32, bfloat16 or float16", settings.dtype);
}

json figure_of(const std::vector<double>& microseconds, std::int64_t bytes) {
  const double median = quantile(microseconds, 0.5);
  return {{"median_us", median},
          {"p05_us", quantile(microseconds, 0.05)},
          {"p95_us", quantile(microseconds, 0.95)},
          {"gigabytes_per_second", static_cast<double>(bytes) / median / 1e3}};
}

json report_of(const CollectiveSettings& settings, const json& measured) {
  json figures;
  for (const auto& [series, samples] : measured["samples"].items())
    figures[series] = figure_of(samples.get<std::vector<double>>(), measured["bytes"].get<std::int64_t>());
  json report = {{"benchmark", "collective"},     {"machine", machine()},   {"versions", versions({})},
                 {"settings", to_json(settings)}, {"gpu", measured["gpu"]}, {"transport", measured["transport"]},
                 {"bytes", measured["bytes"]},    {"figures", figures}};
  for (const char* key : {"nccl", "no_nccl"}) {
    if (measured.contains(key)) report[key] = measured[key];
  }
  return report;
}

std::string table_of(const CollectiveSettings& settings, const json& report) {
  Table table({"", "tokenyard", "GB/s", "NCCL", "GB/s", "NCCL / tokenyard"});
  for (const char* call : {"all_gather_v", "reduce_scatter_v"}) {
    const json& ours = report["figures"][call];
    std::vector<std::string> cells{call, time_text(ours["median_us"]), fmt::format("{:.0f}", ours["gigabytes_per_second"].get<double>())};
    const std::string nccl = std::string("nccl_") + call;
    if (report["figures"].contains(nccl)) {
      const json& theirs = report["figures"][nccl];
      cells.insert(cells.end(), {time_text(theirs["median_us"]), fmt::format("{:.0f}", theirs["gigabytes_per_second"].get<double>()),
                                 fmt::format("{:.2f}", theirs["median_us"].get<double>() / ours["median_us"].get<double>())});
    } else {
      cells.insert(cells.end(), {"-", "-", "-"});
    }
    table.add(cells);
  }
  std::string text =
      fmt::format("{} ranks x {} rows{} x {} {}, {} on {}; the busiest rank sends {} to others\n\n{}\n", settings.ranks, settings.rows,
                  settings.uneven ? " (uneven)" : "", settings.hidden_size, settings.dtype, report["transport"].get<std::string>(),
                  report["gpu"]["name"].get<std::string>(), bytes_text(report["bytes"]), table.text());
  if (report.contains("nccl"))
    text +=
        fmt::format("NCCL {}: all-gather and reduce-scatter, which rounds in an order of its own.\n", report["nccl"].get<std::string>());
  if (report.contains("no_nccl")) text += fmt::format("No NCCL: {}.\n", report["no_nccl"].get<std::string>());
  return text;
}

void run_collective(CollectiveCommand& command) {
  check(command.settings);
  if (!command.json_path.empty()) require_writable("--json", command.json_path);
  const RankRun run = {.role = "bench_collective",
                       .ranks = command.settings.ranks,
                       .runner = Runner::processes,
                       .timeout_ms = command.settings.timeout_ms,
                       .label = "bench collective"};
  const json report = report_of(command.settings, run_on_ranks(run, to_json(command.settings)));
  fmt::print("{}", table_of(command.settings, report));
  write_result(command.json_path, report.dump(1) + "\n");
}

}  // namespace

json to_json(const CollectiveSettings& settings) {
  return {{"ranks", settings.ranks},
          {"rows", settings.rows},
          {"hidden_size", settings.hidden_size},
          {"dtype", settings.dtype},
          {"uneven", settings.uneven},
          {"sm_budget", settings.sm_budget},
          {"staging_bytes", settings.staging_bytes},
          {"iterations", settings.iterations},
          {"warmup", settings.warmup},
          {"timeout_ms", settings.timeout_ms}};
}

CollectiveSettings collective_settings_from_json(const json& settings) {
  return {.ranks = settings["ranks"],
          .rows = settings["rows"],
          .hidden_size = settings["hidden_size"],
          .dtype = settings["dtype"],
          .uneven = settings["uneven"],
          .sm_budget = settings["sm_budget"],
          .staging_bytes = settings["staging_bytes"],
          .iterations = settings["iterations"],
          .warmup = settings["warmup"],
          .timeout_ms = settings["timeout_ms"]};
}

void add_bench_collective(CLI::App& bench) {
  CLI::App* app = bench.add_subcommand("collective", "Measure all_gather_v and reduce_scatter_v on GPUs against NCCL");
  auto command = std::make_shared<CollectiveCommand>();
  CollectiveSettings& settings = command->settings;
  app->add_option("--ranks", settings.ranks, "Processes, rank r on GPU r modulo their number")->capture_default_str();
  app->add_option("--rows", settings.rows, "Rows of each rank: gathered by all, or summed from all")->capture_default_str();
  app->add_option("--hidden-size", settings.hidden_size, "Elements of a row")->capture_default_str();
  app->add_option("--dtype", settings.dtype, "float32, bfloat16 or float16")->capture_default_str();
  app->add_flag("--uneven", settings.uneven, "Rank r has (r + 1) / ranks of the rows; NCCL is left out");
  app->add_option("--sm-budget", settings.sm_budget, "Multiprocessors; 0: the usual")->capture_default_str();
  app->add_option("--staging-bytes", settings.staging_bytes, "Per pair of ranks")->capture_default_str();
  app->add_option("--iterations", settings.iterations)->capture_default_str();
  app->add_option("--warmup", settings.warmup)->capture_default_str();
  app->add_option("--timeout-ms", settings.timeout_ms)->capture_default_str();
  app->add_option("--json", command->json_path, "Also write machine, versions, settings and figures to this file");
  app->callback([command] { run_collective(*command); });
}

}  // namespace tokenyard::cli
