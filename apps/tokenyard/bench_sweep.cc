// bench sweep: measurements over ranks and tokens, as a table, JSON and SVG.

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>

#include "bench_report.h"
#include "bench_run.h"
#include "command.h"
#include "files.h"
#include "svg.h"
#include "table.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

struct SweepCommand {
  Settings settings;
  std::vector<int> ranks = {2, 4};
  std::vector<std::int64_t> tokens = {16, 64, 256, 1024, 4096};
  std::string json_path;
  std::string svg_path;
};

// One solid line per number of ranks, the baseline dashed in its color.
LinePlot plot_of(const json& runs) {
  LinePlot plot;
  plot.title = "dispatch + combine";
  const json& first = runs[0];
  const Settings settings = settings_from_json(first["settings"]);
  plot.subtitle =
      fmt::format("{} {}, top-{} of {}, {}, {}; {}, {} cores", settings.hidden_size, settings.dtype, settings.top_k, settings.experts,
                  settings.layout, settings.mode, first["machine"]["cpu"].get<std::string>(), first["machine"]["cores"].get<int>());
  plot.x_label = "tokens per rank";
  plot.y_label = "microseconds (median)";
  std::vector<LineSeries> baselines;
  for (const json& run : runs) {
    const int ranks = run["settings"]["ranks"];
    const std::string label = fmt::format("{} ranks, {}", ranks, run["transport"].get<std::string>());
    if (plot.series.empty() || plot.series.back().label != label) {
      const int color = static_cast<int>(plot.series.size());
      plot.series.push_back({label, color, false, {}});
      baselines.push_back({fmt::format("{} ranks, {}", ranks, baseline_name(run)), color, true, {}});
    }
    const double tokens = run["settings"]["tokens"];
    const json& figure = run["figures"]["dispatch_and_combine"];
    plot.series.back().points.emplace_back(tokens, figure["median_us"]);
    if (figure.contains("baseline_us")) baselines.back().points.emplace_back(tokens, figure["baseline_us"]);
  }
  for (LineSeries& baseline : baselines) {
    if (!baseline.points.empty()) plot.series.push_back(std::move(baseline));
  }
  return plot;
}

// Every point is checked before the first one runs.
std::vector<Settings> points_of(CLI::App& app, const SweepCommand& command) {
  std::vector<Settings> points;
  for (const int ranks : command.ranks) {
    for (const std::int64_t tokens : command.tokens) {
      Settings settings = command.settings;
      settings.ranks = ranks;
      settings.tokens = tokens;
      complete_shape(app, settings);
      complete_run(settings);
      points.push_back(settings);
    }
  }
  return points;
}

void run_sweep(CLI::App& app, SweepCommand& command) {
  std::sort(command.tokens.begin(), command.tokens.end());
  const std::vector<Settings> points = points_of(app, command);
  if (!command.json_path.empty()) require_writable("--json", command.json_path);
  if (!command.svg_path.empty()) require_writable("--svg", command.svg_path);
  json runs = json::array();
  const bool on_gpus = command.settings.device == "cuda";
  Table table({"ranks", "tokens", "dispatch", "combine", "sum", on_gpus ? "of link" : "of memcpy", on_gpus ? "vs NCCL" : "vs MPI"});
  for (const Settings& settings : points) {
    runs.push_back(measure(settings, fmt::format("sweep {}/{}", runs.size() + 1, points.size())));
    const json& figures = runs.back()["figures"];
    const json& sum = figures["dispatch_and_combine"];
    table.add({std::to_string(settings.ranks), std::to_string(settings.tokens), time_text(figures["dispatch"]["median_us"]),
               time_text(figures[figures.contains("combine") ? "combine" : "combine_copy"]["median_us"]), time_text(sum["median_us"]),
               fmt::format("{:.0f} %", 100 * sum["ratio_to_limit"].get<double>()),
               sum.contains("ratio_to_baseline") ? fmt::format("{:.2f} x", sum["ratio_to_baseline"].get<double>()) : "-"});
  }
  fmt::print("{}\n{}", describe(points.front()), table.text());
  if (!runs[0]["baseline"]["measured"].get<bool>()) {
    fmt::print("no {} baseline: {}\n", baseline_name(runs[0]), runs[0]["baseline"]["why_not"].get<std::string>());
  }
  write_result(command.json_path, json{{"format", kBenchFormat}, {"kind", "sweep"}, {"runs", runs}}.dump(1) + "\n");
  if (!command.svg_path.empty()) write_result(command.svg_path, line_plot(plot_of(runs)));
}

}  // namespace

void add_bench_sweep(CLI::App& bench) {
  CLI::App* app = bench.add_subcommand("sweep", "Measure over several numbers of ranks and tokens");
  auto command = std::make_shared<SweepCommand>();
  add_shape_options(*app, command->settings);
  add_run_options(*app, command->settings);
  app->remove_option(app->get_option("--ranks"));
  app->remove_option(app->get_option("--tokens"));
  app->add_option("--ranks", command->ranks, "Numbers of ranks")->delimiter(',')->capture_default_str();
  app->add_option("--tokens", command->tokens, "Tokens per rank")->delimiter(',')->capture_default_str();
  app->add_option("--json", command->json_path, "Also write all measurements to this file");
  app->add_option("--svg", command->svg_path, "Also draw them: time over tokens, a line per number of ranks");
  app->footer(
      "Examples:\n"
      "  tokenyard bench sweep --ranks 2,4 --tokens 16,256,4096 --json sweep.json --svg sweep.svg\n"
      "  tokenyard bench sweep --ranks 2 --tokens 64,128 --mode latency --hidden-size 2048 --iterations 200");
  app->callback([app, command] { run_sweep(*app, *command); });
}

}  // namespace tokenyard::cli
