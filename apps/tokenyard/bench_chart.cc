// bench chart: the ratios of several measurements as SVG.

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>

#include "bench_report.h"
#include "command.h"
#include "core/usage.h"
#include "files.h"
#include "svg.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

struct ChartCommand {
  std::vector<std::string> files;
  std::string svg_path;
};

struct BarOf {
  const char* figure;
  const char* ratio;
  const char* label;
};
constexpr BarOf kBars[] = {{"dispatch", "ratio_to_plain", "dispatch / plain"},
                           {"combine", "ratio_to_plain", "combine / plain"},
                           {"dispatch_and_combine", "ratio_to_plain", "dispatch + combine / plain"},
                           {"dispatch_and_combine", "ratio_to_baseline", "dispatch + combine / tuned"}};
constexpr BarOf kGpuBars[] = {{"dispatch", "ratio_to_baseline", "dispatch"},
                              {"combine", "ratio_to_baseline", "combine from expert_rows()"},
                              {"combine_copy", "ratio_to_baseline", "combine, rows of the caller"},
                              {"dispatch_and_combine", "ratio_to_baseline", "dispatch + combine"}};

BarGroup group_of(const json& run) {
  const Settings settings = settings_from_json(run["settings"]);
  BarGroup group;
  group.label = fmt::format("{} ranks, {} tokens x {} {}, top-{} of {}, {}, {}", settings.ranks, settings.tokens, settings.hidden_size,
                            settings.dtype, settings.top_k, settings.experts, settings.mode, settings.layout);
  for (const auto& [name, key, label] : settings.device == "cuda" ? std::span<const BarOf>(kGpuBars) : std::span<const BarOf>(kBars)) {
    if (!run["figures"].contains(name) || !run["figures"][name].contains(key)) continue;
    const json& figure = run["figures"][name];
    const double ratio = figure[key];
    group.bars.push_back({label, ratio, fmt::format("{:.1f} x  ({:.0f} %)", ratio, 100 * figure["ratio_to_limit"].get<double>())});
  }
  return group;
}

void name_axes(BarChart& chart, const std::string& baseline, const std::string& limit) {
  chart.title = fmt::format("Direct exchange against the collective exchange over {}, same run", baseline);
  chart.axis_label =
      fmt::format("times faster than {} (bench says what it is); in brackets: of the speed of {} for the same bytes (medians)",
                  baseline == "MPI" ? "plain or tuned MPI" : baseline, limit == "link" ? "the link" : limit);
  chart.reference = 1;
  chart.reference_label = baseline;
}

void run_chart(const ChartCommand& command) {
  require_writable("--svg", command.svg_path);
  BarChart chart;
  for (const std::string& path : command.files) {
    for (const json& run : read_runs(path)) {
      if (!run["baseline"]["measured"].get<bool>()) {
        usage_error("{}: has no {} baseline ({}); the chart shows ratios to it", path, baseline_name(run),
                    run["baseline"]["why_not"].get<std::string>());
      }
      chart.subtitle = fmt::format("{}, {} cores", run["machine"]["cpu"].get<std::string>(), run["machine"]["cores"].get<int>());
      if (chart.groups.empty()) name_axes(chart, baseline_name(run), limit_name(run));
      if (chart.reference_label != baseline_name(run)) {
        usage_error("{}: was measured against {}, the first run against {}; draw them apart", path, baseline_name(run),
                    chart.reference_label);
      }
      chart.groups.push_back(group_of(run));
    }
  }
  write_file(command.svg_path, bar_chart(chart));
  fmt::print("written: {}\n", command.svg_path);
}

}  // namespace

void add_bench_chart(CLI::App& bench) {
  CLI::App* app = bench.add_subcommand("chart", "Draw the ratios to MPI of one or more measurements");
  auto command = std::make_shared<ChartCommand>();
  app->add_option("FILE", command->files, "Written by bench --json or bench sweep --json")->required();
  app->add_option("--svg", command->svg_path, "Where the chart goes")->required();
  app->footer(
      "Examples:\n"
      "  tokenyard bench chart two_ranks.json four_ranks.json --svg chart.svg");
  app->callback([command] { run_chart(*command); });
}

}  // namespace tokenyard::cli
