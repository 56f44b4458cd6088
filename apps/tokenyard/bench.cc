// bench: how fast dispatch and combine are here, against memcpy and MPI.

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "bench_report.h"
#include "bench_run.h"
#include "command.h"
#include "files.h"

namespace tokenyard::cli {
namespace {

struct BenchCommand {
  Settings settings;
  std::string json_path;
};

void run_bench(CLI::App& app, BenchCommand& command) {
  complete_shape(app, command.settings);
  complete_run(command.settings);
  if (!command.json_path.empty()) require_writable("--json", command.json_path);
  const nlohmann::json report = measure(command.settings, "bench");
  fmt::print("{}", bench_table(report));
  write_result(command.json_path, report.dump(1) + "\n");
}

}  // namespace

nlohmann::json measure(const Settings& settings, const std::string& label) {
  std::string no_baseline;
  const Runner runner = choose_runner(settings, no_baseline);
  const RankRun run = {.role = settings.device == "cuda" ? "bench_cuda" : "bench",
                       .ranks = settings.ranks,
                       .runner = runner,
                       .timeout_ms = settings.timeout_ms,
                       .label = label};
  const nlohmann::json measured = run_on_ranks(run, {{"settings", to_json(settings)}, {"with_baseline", no_baseline.empty()}});
  return bench_report(settings, runner, no_baseline, measured);
}

void add_bench(CLI::App& program) {
  CLI::App* app = program.add_subcommand("bench", "Measure dispatch and combine against memcpy and a collective exchange over MPI");
  auto command = std::make_shared<BenchCommand>();
  add_shape_options(*app, command->settings);
  add_run_options(*app, command->settings);
  app->add_option("--json", command->json_path, "Also write machine, versions, settings and figures to this file");
  app->footer(
      "Examples:\n"
      "  tokenyard bench\n"
      "  tokenyard bench --ranks 2 --tokens 1024 --preset qwen3-30b-a3b --skew 0.8 --json now.json\n"
      "  tokenyard bench --mode latency --tokens 16 --layout rank_slots\n"
      "  tokenyard bench --placement tp:2 --layout expert_major\n"
      "  tokenyard bench sweep --ranks 2,4 --tokens 16,256,4096 --svg sweep.svg\n"
      "  tokenyard bench compare before.json now.json\n"
      "  tokenyard bench collective --ranks 2 --json collective.json");
  add_bench_sweep(*app);
  add_bench_compare(*app);
  add_bench_chart(*app);
  add_bench_collective(*app);
  add_bench_experts(*app);
  add_bench_layer(*app);
  app->callback([app, command] {
    if (app->get_subcommands().empty()) run_bench(*app, *command);
  });
}

}  // namespace tokenyard::cli
