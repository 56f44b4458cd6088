// demo: a real text through an MoE layer on several processes, verified.

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <chrono>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>

#include "channel.h"
#include "command.h"
#include "core/usage.h"
#include "demo.h"
#include "files.h"
#include "ranks.h"
#include "tokenyard/routing.h"
#include "tokenyard/tensor_view.h"

namespace tokenyard::cli {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct DemoCommand {
  DemoSettings settings;
  std::string text_path;
  std::string out = "out/demo";
};

void require_range(const char* option, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) usage_error("{} {}: out of range; give a number from {} to {}", option, value, low, high);
}

void complete(DemoSettings& settings) {
  require_range("--ranks", settings.ranks, 1, Channel::kMaxRanks);
  require_range("--tokens", settings.tokens, 1, 1 << 26);
  require_range("--batch", settings.batch_tokens, 1, 1 << 16);
  require_range("--hidden-size", settings.hidden_size, 1, 1 << 13);
  require_range("--expert-width", settings.expert_width, 1, 1 << 13);
  require_range("--threads", settings.threads, 1, 256);
  require_range("--timeout-ms", settings.timeout_ms, 1, 86'400'000);
  model_preset(settings.preset);
  const Dtype dtype = parse_dtype(settings.dtype);
  if (dtype != Dtype::float32 && dtype != Dtype::bfloat16) usage_error("--dtype {}: use float32 or bfloat16", settings.dtype);
  settings.dtype = name(dtype);
  const std::int64_t unit = 16 / size_of(dtype);
  if (settings.hidden_size % unit != 0) {
    usage_error("--hidden-size {}: a row of {} {} has {} bytes, which is no multiple of 16; use a multiple of {}", settings.hidden_size,
                settings.hidden_size, settings.dtype, settings.hidden_size * size_of(dtype), unit);
  }
}

// The folder for the report, before any work is done.
void make_folder(const std::string& out) {
  std::error_code failed;
  fs::create_directories(out, failed);
  if (failed) usage_error("--out {}: cannot be created ({}); name a folder of yours", out, failed.message());
  require_writable("--out", (fs::path(out) / "report.html").string());
  require_writable("--out", (fs::path(out) / "report.json").string());
}

void run_demo(DemoCommand& command) {
  complete(command.settings);
  const DemoText text = demo_text(command.text_path, command.settings.tokens);
  make_folder(command.out);
  const RankRun run = {.role = "demo",
                       .ranks = command.settings.ranks,
                       .runner = Runner::processes,
                       .timeout_ms = command.settings.timeout_ms,
                       .label = "demo"};
  const auto start = std::chrono::steady_clock::now();
  const std::vector<std::uint8_t> bytes(text.bytes.begin(), text.bytes.end());
  const json measured = run_on_ranks(run, {{"settings", to_json(command.settings)}, {"text", json::binary(bytes)}});
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const json report = demo_report(command.settings, text, measured["ranks"], seconds);
  fmt::print("{}", demo_summary(report));
  const fs::path html = fs::path(command.out) / "report.html";
  const fs::path data = fs::path(command.out) / "report.json";
  write_file(html.string(), demo_html(report));
  write_file(data.string(), report.dump(1) + "\n");
  if (!report["checks"]["ok"].get<bool>()) throw Error(report["checks"]["fault"].get<std::string>());
  fmt::print("report  {} (open it in a browser), {}\n", html.string(), data.string());
}

}  // namespace

void add_demo(CLI::App& program) {
  CLI::App* app = program.add_subcommand("demo", "Send a real text through an MoE layer on several processes, and check every row");
  auto command = std::make_shared<DemoCommand>();
  DemoSettings& settings = command->settings;
  app->add_option("--ranks", settings.ranks, "Number of processes")->capture_default_str();
  app->add_option("--preset", settings.preset, "Model whose experts and gate are used, e.g. deepseek-v3")->capture_default_str();
  app->add_option("--text", command->text_path, "A file; default: this repository's documents and sources");
  app->add_option("--tokens", settings.tokens, "Bytes of the text to use, a token each")->capture_default_str();
  app->add_option("--batch", settings.batch_tokens, "Tokens per rank and batch")->capture_default_str();
  app->add_option("--hidden-size", settings.hidden_size, "Elements of a row")->capture_default_str();
  app->add_option("--expert-width", settings.expert_width, "Inner size of an expert")->capture_default_str();
  app->add_option("--dtype", settings.dtype, "float32 or bf16")->capture_default_str();
  app->add_option("--threads", settings.threads, "Threads per rank that move rows")->capture_default_str();
  app->add_option("--seed", settings.seed, "Seed of all weights")->capture_default_str();
  app->add_option("--out", command->out, "Folder of report.html and report.json")->capture_default_str();
  app->add_option("--timeout-ms", settings.timeout_ms, "Deadline of every wait")->capture_default_str();
  app->footer(
      "Examples:\n"
      "  tokenyard demo\n"
      "  tokenyard demo --text novel.txt --preset deepseek-v3 --ranks 8\n"
      "  tokenyard demo --tokens 20000 --dtype bf16 --hidden-size 256 --out report");
  app->callback([command] { run_demo(*command); });
}

}  // namespace tokenyard::cli
