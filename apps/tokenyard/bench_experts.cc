// bench experts: grouped matrix products on a GPU, against what bounds them and against cuBLAS.

#include "bench_experts.h"

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <charconv>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "core/usage.h"
#include "files.h"
#include "machine.h"
#include "table.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

struct Command {
  ExpertsSettings settings;
  std::vector<std::string> shapes;
  std::string dtype = "bfloat16";
  std::string json_path;
};

// "384x2048"
ProductShape shape_of(const std::string& text) {
  ProductShape shape;
  const char* const end = text.data() + text.size();
  const auto outputs = std::from_chars(text.data(), end, shape.outputs);
  const bool has_inputs = outputs.ec == std::errc() && outputs.ptr != end && *outputs.ptr == 'x';
  const auto inputs = has_inputs ? std::from_chars(outputs.ptr + 1, end, shape.inputs) : outputs;
  if (!has_inputs || inputs.ec != std::errc() || inputs.ptr != end || shape.outputs < 1 || shape.inputs < 1) {
    usage_error("--shape {}: give outputs x inputs, e.g. 384x2048", text);
  }
  return shape;
}

void complete(Command& command) {
  ExpertsSettings& settings = command.settings;
  if (!command.shapes.empty()) settings.shapes.clear();
  for (const std::string& text : command.shapes) settings.shapes.push_back(shape_of(text));
  if (settings.groups < 1 || settings.rows < 1) usage_error("--groups {} --rows {}: both are at least 1", settings.groups, settings.rows);
  if (settings.iterations < 1 || settings.warmup < 0) {
    usage_error("--iterations {} --warmup {}: give at least 1, respectively 0", settings.iterations, settings.warmup);
  }
  if (command.dtype != "bfloat16" && command.dtype != "float16") {
    usage_error("--dtype {}: give bfloat16 or float16", command.dtype);
  }
  settings.dtype = command.dtype == "bfloat16" ? Dtype::bfloat16 : Dtype::float16;
  if (!command.json_path.empty()) require_writable("--json", command.json_path);
}

std::string time_cell(const json& figure, const char* name) {
  return figure[name].is_number() ? fmt::format("{:.0f}", figure[name].get<double>()) : "-";
}

void print_text(const json& report) {
  const json& measured = report["measured"];
  fmt::print("{}, {} groups of {} rows on average, {}; results checked; median microseconds\n\n", measured["gpu"].get<std::string>(),
             report["settings"]["groups"].get<int>(), report["settings"]["rows"].get<int>(),
             report["settings"]["dtype"].get<std::string>());
  Table table({"product", "groups", "us", "TFLOP/s", "bound", "of bound", "cuBLAS grouped", "cuBLAS loop"});
  for (const json& run : measured["runs"]) {
    for (const auto& [name, figure] : run["figures"].items()) {
      table.add({fmt::format("{} {}x{}", name, run["outputs"].get<int>(), run["inputs"].get<int>()), run["groups"].get<std::string>(),
                 time_cell(figure, "median_us"), fmt::format("{:.0f}", figure["teraflops"].get<double>()), time_cell(figure, "bound_us"),
                 fmt::format("{:.0f} %", 100 * figure["ratio_to_bound"].get<double>()), time_cell(figure, "cublas_grouped_us"),
                 time_cell(figure, "cublas_loop_us")});
    }
  }
  fmt::print("{}", table.text());
  fmt::print("bound: the larger of operations / {:.0f} TFLOP/s and bytes / {:.2f} TB/s, both measured here\n",
             measured["ceilings"]["teraflops"].get<double>(), measured["ceilings"]["terabytes_per_second"].get<double>());
  if (!measured["baselines"]["why_not"].get<std::string>().empty()) fmt::print("{}\n", measured["baselines"]["why_not"].get<std::string>());
}

void run(Command& command) {
  complete(command);
  const ExpertsSettings& settings = command.settings;
  json shapes = json::array();
  for (const ProductShape& shape : settings.shapes) shapes.push_back({{"outputs", shape.outputs}, {"inputs", shape.inputs}});
  const json report = {{"format", "tokenyard-bench-experts-2"},
                       {"settings",
                        {{"groups", settings.groups},
                         {"rows", settings.rows},
                         {"shapes", shapes},
                         {"dtype", command.dtype},
                         {"sm_margin", settings.sm_margin},
                         {"warmup", settings.warmup},
                         {"iterations", settings.iterations}}},
                       {"machine", machine()},
                       {"versions", versions("")},
                       {"measured", measure_experts(settings)}};
  print_text(report);
  if (!command.json_path.empty()) write_file(command.json_path, report.dump(1) + "\n");
}

}  // namespace

void add_bench_experts(CLI::App& bench) {
  CLI::App* app = bench.add_subcommand("experts", "Grouped matrix products of experts on one GPU, against their bound and cuBLAS");
  auto command = std::make_shared<Command>();
  app->add_option("--groups", command->settings.groups, "Local experts")->capture_default_str();
  app->add_option("--rows", command->settings.rows, "Rows of an expert, on average")->capture_default_str();
  app->add_option("--shape", command->shapes, "Outputs x inputs of a weight, may be repeated; default 384x2048 and 2048x192");
  app->add_option("--dtype", command->dtype, "bfloat16 or float16")->capture_default_str();
  app->add_option("--sm-margin", command->settings.sm_margin, "Multiprocessors left to others")->capture_default_str();
  app->add_option("--warmup", command->settings.warmup, "Untimed iterations")->capture_default_str();
  app->add_option("--iterations", command->settings.iterations, "Timed iterations")->capture_default_str();
  app->add_option("--json", command->json_path, "Also write everything to this file");
  app->footer(
      "Examples:\n"
      "  tokenyard bench experts\n"
      "  tokenyard bench experts --groups 128 --rows 256 --shape 1536x2048 --json experts.json\n"
      "libcublas.so is looked for at run time; TOKENYARD_CUBLAS names another file.");
  app->callback([command] { run(*command); });
}

}  // namespace tokenyard::cli
