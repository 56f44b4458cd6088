// bench layer: one MoE layer of a published model, forward on GPUs, against what bounds it.

#include "bench_layer.h"

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>

#include "bench_samples.h"
#include "command.h"
#include "core/usage.h"
#include "files.h"
#include "machine.h"
#include "ranks.h"
#include "table.h"
#include "tokenyard/layer.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

struct LayerCommand {
  LayerSettings settings;
  std::string device = "cuda";
  std::string json_path;
};

void complete(LayerCommand& command) {
  LayerSettings& settings = command.settings;
  const auto at_least = [](const char* option, std::int64_t value, std::int64_t least) {
    if (value < least) usage_error("{} is {}; it must be {} or more", option, value, least);
  };
  at_least("--ranks", settings.ranks, 2);
  at_least("--tokens", settings.tokens, 1);
  at_least("--iterations", settings.iterations, 1);
  at_least("--warmup", settings.warmup, 0);
  if (command.device != "cuda") usage_error("--device is {}; the layer is measured on cuda", command.device);
  model_preset(settings.preset);
  if (settings.preset.starts_with("gpt-oss"))
    usage_error("--preset {}: its biases and clamped activation are not drawn here; use another, e.g. qwen3-30b-a3b", settings.preset);
  if (settings.mode.empty()) settings.mode = name(mode_for_step(settings.tokens));
  parse_mode(settings.mode);
  if (!command.json_path.empty()) require_writable("--json", command.json_path);
}

json figure_of(const std::vector<double>& microseconds) {
  return {{"median_us", quantile(microseconds, 0.5)}, {"p05_us", quantile(microseconds, 0.05)}, {"p95_us", quantile(microseconds, 0.95)}};
}

// Microseconds that the busiest rank's work takes at the rates measured in the same processes.
json bounds_of(const json& work, const json& limits) {
  json bounds;
  const auto add = [&](const char* bound, const char* amount, const char* rate) {
    if (limits.contains(rate)) bounds[bound] = work[amount].get<double>() / limits[rate].get<double>();
  };
  add("link_us", "bytes_to_others", "link_bytes_per_us");
  add("matrix_us", "flops", "flops_per_us");
  add("memory_us", "weight_bytes", "memory_bytes_per_us");
  return bounds;
}

double largest(const json& bounds, std::initializer_list<const char*> of) {
  double us = 0;
  for (const char* bound : of) us = std::max(us, bounds.value(bound, 0.0));
  return us;
}

json report_of(const LayerSettings& settings, const json& measured) {
  json figures;
  for (const auto& [series, samples] : measured["samples"].items()) figures[series] = figure_of(samples.get<std::vector<double>>());
  const json bounds = bounds_of(measured["work"], measured["limits"]);
  const double us = figures["layer"]["median_us"];
  return {
      {"benchmark", "layer"},
      {"machine", machine()},
      {"versions", versions({})},
      {"settings", to_json(settings)},
      {"gpu", measured["gpu"]},
      {"limits", measured["limits"]},
      {"work", measured["work"]},
      {"bounds", bounds},
      {"of_link_and_matrix", largest(bounds, {"link_us", "matrix_us"}) / us},
      {"of_all_bounds", largest(bounds, {"link_us", "matrix_us", "memory_us"}) / us},
      {"figures", figures},
      {"samples", measured["samples"]},
      {"notes",
       {{"layer", "a step, enqueued ahead, from a barrier of all GPUs; of the slowest rank"},
        {"traced_layer", "the same with events between its phases; the shared expert runs inside dispatch, beside rows on their way"},
        {"work", "of the busiest rank: operations, bytes of weights of experts with rows, bytes of rows sent to others in both calls"}}}};
}

std::string table_of(const LayerSettings& settings, const json& report) {
  Table table({"", "median", "5 %", "95 %"});
  for (const auto& [series, figure] : report["figures"].items())
    table.add({series, time_text(figure["median_us"]), time_text(figure["p05_us"]), time_text(figure["p95_us"])});
  std::string text = fmt::format("{}, {} ranks x {} tokens, {} mode, on {}; a sample of rows checked\n\n{}\n", settings.preset,
                                 settings.ranks, settings.tokens, settings.mode, report["gpu"]["name"].get<std::string>(), table.text());
  for (const auto& [bound, us] : report["bounds"].items()) text += fmt::format("{} {}\n", bound, time_text(us));
  return text + fmt::format("the larger of link and matrix products is {:.0f} % of the step; of all bounds {:.0f} %\n",
                            100 * report["of_link_and_matrix"].get<double>(), 100 * report["of_all_bounds"].get<double>());
}

void run_layer(LayerCommand& command) {
  complete(command);
  const RankRun run = {.role = "bench_layer",
                       .ranks = command.settings.ranks,
                       .runner = Runner::processes,
                       .timeout_ms = command.settings.timeout_ms,
                       .label = "bench layer"};
  const json report = report_of(command.settings, run_on_ranks(run, to_json(command.settings)));
  fmt::print("{}", table_of(command.settings, report));
  write_result(command.json_path, report.dump(1) + "\n");
}

}  // namespace

json to_json(const LayerSettings& settings) {
  return {{"ranks", settings.ranks},
          {"preset", settings.preset},
          {"tokens", settings.tokens},
          {"mode", settings.mode},
          {"dtype", "bfloat16"},
          {"sm_budget", settings.sm_budget},
          {"iterations", settings.iterations},
          {"warmup", settings.warmup},
          {"timeout_ms", settings.timeout_ms}};
}

LayerSettings layer_settings_from_json(const json& settings) {
  return {.ranks = settings["ranks"],
          .preset = settings["preset"],
          .tokens = settings["tokens"],
          .mode = settings["mode"],
          .sm_budget = settings["sm_budget"],
          .iterations = settings["iterations"],
          .warmup = settings["warmup"],
          .timeout_ms = settings["timeout_ms"]};
}

void add_bench_layer(CLI::App& bench) {
  CLI::App* app = bench.add_subcommand("layer", "Measure an MoE layer of a published model, forward on GPUs, in bfloat16");
  auto command = std::make_shared<LayerCommand>();
  LayerSettings& settings = command->settings;
  app->add_option("--device", command->device, "cuda")->capture_default_str();
  app->add_option("--ranks", settings.ranks, "Processes, rank r on GPU r modulo their number")->capture_default_str();
  app->add_option("--preset", settings.preset, "A model's sizes and gate, e.g. qwen3-30b-a3b, glm-4.5")->capture_default_str();
  app->add_option("--tokens", settings.tokens, "Of each rank")->capture_default_str();
  app->add_option("--mode", settings.mode, "throughput or latency; default: latency up to 128 tokens");
  app->add_option("--sm-budget", settings.sm_budget, "Multiprocessors of the exchange; 0: the usual")->capture_default_str();
  app->add_option("--iterations", settings.iterations)->capture_default_str();
  app->add_option("--warmup", settings.warmup)->capture_default_str();
  app->add_option("--timeout-ms", settings.timeout_ms)->capture_default_str();
  app->add_option("--json", command->json_path, "Also write machine, versions, settings, samples and figures to this file");
  app->callback([command] { run_layer(*command); });
}

}  // namespace tokenyard::cli
