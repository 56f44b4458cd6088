// plan-memory: what an exchange will need, before anything is allocated.

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "core/usage.h"
#include "settings.h"
#include "table.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

struct PlanCommand {
  Settings settings;
  std::int64_t receive_rows = 0;
  std::int64_t max_expert_rows = 0;
  bool unfolded = false;
  bool as_json = false;
};

void run_plan(CLI::App& app, PlanCommand& command) {
  complete_shape(app, command.settings);
  for (const auto& [option, rows] :
       {std::pair{"--receive-rows", command.receive_rows}, std::pair{"--max-expert-rows", command.max_expert_rows}}) {
    if (rows < 0) usage_error("{} {}: give a number of rows, or 0 for the bound", option, rows);
  }
  ExchangeOptions options = exchange_options(command.settings, placement_of(command.settings));
  options.receive_rows = command.receive_rows;
  options.max_expert_rows = command.max_expert_rows;
  options.unfolded = command.unfolded;
  const MemoryPlan plan = Exchange::memory_plan(options, command.settings.ranks);
  if (command.as_json) {
    json items = json::array();
    for (const MemoryItem& item : plan.items)
      items.push_back({{"purpose", item.purpose}, {"bytes", item.bytes}, {"formula", item.formula}});
    fmt::print("{}\n", json{{"settings", to_json(command.settings)}, {"items", items}, {"bytes_per_rank", plan.total()}}.dump(1));
    return;
  }
  fmt::print("{}, per rank\n\n", describe(command.settings));
  Table table({"", "bytes", "", "formula"});
  for (const MemoryItem& item : plan.items) table.add({item.purpose, count_text(item.bytes), bytes_text(item.bytes), item.formula});
  table.add({"total", count_text(plan.total()), bytes_text(plan.total()), ""});
  fmt::print("{}", table.text());
}

}  // namespace

void add_plan_memory(CLI::App& program) {
  CLI::App* app = program.add_subcommand("plan-memory", "Bytes that an exchange needs, by purpose, for any number of ranks");
  auto command = std::make_shared<PlanCommand>();
  add_shape_options(*app, command->settings);
  app->add_option("--receive-rows", command->receive_rows, "Rows a rank can receive at once; 0: the bound")->capture_default_str();
  app->add_option("--max-expert-rows", command->max_expert_rows, "Rows of expert_major with capacity; 0: the bound")->capture_default_str();
  app->add_flag("--unfolded", command->unfolded, "With staging for combine without fold");
  app->add_flag("--json", command->as_json, "Print JSON");
  app->footer(
      "Examples:\n"
      "  tokenyard plan-memory --preset deepseek-v3 --ranks 64 --tokens 4096\n"
      "  tokenyard plan-memory --ranks 8 --mode latency --tokens 128 --json\n"
      "  tokenyard plan-memory --ranks 16 --placement tp:2 --receive-rows 20000");
  app->callback([app, command] { run_plan(*app, *command); });
}

}  // namespace tokenyard::cli
