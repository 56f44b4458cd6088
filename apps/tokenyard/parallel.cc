// parallel: all sizes of a parallel configuration from a few, and what every rank is and holds.

#include "tokenyard/parallel.h"

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "core/usage.h"
#include "files.h"
#include "table.h"
#include "tokenyard/placement.h"
#include "tokenyard/routing.h"

namespace tokenyard::cli {
namespace {

using nlohmann::ordered_json;

struct ParallelCommand {
  ParallelRequest request;
  std::string transport = "automatic";
  std::string preset;
  int experts = 0;       // 0: not asked for
  int expert_width = 0;  // 0: not known
  std::string json_path;
};

// The part of the experts that one rank holds: experts [first, first + count) and, of each, rows [first_row, first_row + rows).
struct Held {
  int first = 0;
  int count = 0;
  int first_row = 0;
  int rows = 0;
};

void complete(CLI::App& app, ParallelCommand& command) {
  command.request.transport = parse_transport(command.transport);
  if (!command.preset.empty()) {
    for (const char* option : {"--experts", "--expert-width"}) {
      if (app.count(option) > 0) usage_error("{} with --preset {}: the preset says it; leave one of the two out", option, command.preset);
    }
    const ModelPreset& preset = model_preset(command.preset);
    command.experts = preset.num_experts;
    command.expert_width = preset.expert_width;
  }
  if (command.experts < 0 || command.experts > 65536)
    usage_error("--experts {}: out of range; give a number from 1 to 65536", command.experts);
  if (command.expert_width < 0) usage_error("--expert-width {}: out of range; give the rows of one projection", command.expert_width);
  if (command.expert_width > 0 && command.experts == 0) usage_error("--expert-width {} without --experts; give both", command.expert_width);
}

// Windows are contiguous, and all outer replicas hold the same.
std::vector<Held> what_ranks_hold(const ParallelCommand& command, const ParallelConfig& config) {
  if (command.expert_width % config.mlp_tp != 0) {
    usage_error("expert width {} is no multiple of mlp_tp = {}; every shard has as many rows: choose sizes with another mlp_tp",
                command.expert_width, config.mlp_tp);
  }
  const Placement placement = Placement::tensor_parallel(command.experts, config.ep, config.mlp_tp);
  const int rows = command.expert_width / config.mlp_tp;
  std::vector<Held> held;
  for (int rank = 0; rank < config.device_count; ++rank) {
    const auto experts = placement.local_experts(config.split_arguments(SubWorld::ep_tp, rank).key);
    const int first = experts.empty() ? 0 : experts.front();
    held.push_back({first, static_cast<int>(experts.size()), config.coordinates(rank).mlp_tp * rows, rows});
  }
  return held;
}

std::string range_text(int first, int count) {
  return count == 0 ? "none" : count == 1 ? std::to_string(first) : fmt::format("{}-{}", first, first + count - 1);
}

std::string report(const ParallelConfig& config, const std::vector<Held>& held) {
  std::string text = fmt::format("{} ranks on {} node{}: ", config.device_count, config.nnodes, config.nnodes == 1 ? "" : "s");
  text += fmt::format("dp {}, tp {}, ep {}, cp {}\n", config.dp, config.tp, config.ep, config.cp);
  text += fmt::format("attention  outer_dp {} x attn_dp {} x attn_tp {} x attn_cp {}\n", config.outer_dp, config.attn_dp, config.attn_tp,
                      config.attn_cp);
  text += fmt::format("experts    outer_dp {} x ep {} x mlp_tp {}\n\n", config.outer_dp, config.ep, config.mlp_tp);
  std::vector<std::string> header = {"rank", "node", "outer", "attn_dp", "attn_tp", "attn_cp", "ep", "mlp_tp"};
  const bool has_rows = !held.empty() && held.front().rows > 0;
  header.insert(header.end(), {"experts", "shard"});
  if (has_rows) header.emplace_back("rows of gate and up");
  Table table(header);
  for (int rank = 0; rank < config.device_count; ++rank) {
    const RankCoordinates at = config.coordinates(rank);
    std::vector<std::string> cells;
    for (const int value : {at.rank, at.node, at.outer, at.attn_dp, at.attn_tp, at.attn_cp, at.ep, at.mlp_tp}) {
      cells.push_back(std::to_string(value));
    }
    cells.push_back(held.empty() ? fmt::format("window {}/{}", at.ep, config.ep) : range_text(held[rank].first, held[rank].count));
    cells.push_back(fmt::format("{}/{}", at.mlp_tp, config.mlp_tp));
    if (has_rows) cells.push_back(range_text(held[rank].first_row, held[rank].rows));
    table.add(std::move(cells));
  }
  return text + table.text();
}

ordered_json report_json(const ParallelConfig& config, const std::vector<Held>& held, const ParallelCommand& command) {
  ordered_json root = ordered_json::parse(config.to_json());
  if (!held.empty()) root["num_experts"] = command.experts;
  for (int rank = 0; rank < config.device_count; ++rank) {
    ordered_json& entry = root["ranks"][rank];
    const RankCoordinates at = config.coordinates(rank);
    entry["expert_window"] = {at.ep, config.ep};  // number, of how many
    entry["expert_shard"] = {at.mlp_tp, config.mlp_tp};
    if (held.empty()) continue;
    entry["first_expert"] = held[rank].first;
    entry["num_local_experts"] = held[rank].count;
    if (held[rank].rows > 0) entry["expert_rows"] = {held[rank].first_row, held[rank].rows};  // first, count
  }
  return root;
}

void run_parallel(CLI::App& app, ParallelCommand& command) {
  complete(app, command);
  const bool to_file = !command.json_path.empty() && command.json_path != "-";
  if (to_file) require_writable("--json", command.json_path);
  const ParallelConfig config = solve_parallel(command.request);
  const std::vector<Held> held = command.experts > 0 ? what_ranks_hold(command, config) : std::vector<Held>();
  if (command.json_path != "-") fmt::print("{}", report(config, held));
  if (command.json_path.empty()) return;
  const std::string json = report_json(config, held, command).dump(1) + "\n";
  if (to_file) {
    write_result(command.json_path, json);
  } else {
    fmt::print("{}", json);
  }
}

}  // namespace

void add_parallel(CLI::App& program) {
  CLI::App* app = program.add_subcommand("parallel", "All sizes of a parallel configuration from a few, and what each rank holds");
  auto command = std::make_shared<ParallelCommand>();
  ParallelRequest& request = command->request;
  app->add_option("--nnodes", request.nnodes, "Hosts; each holds consecutive ranks")->capture_default_str();
  app->add_option("--device-count", request.device_count, "Ranks of all hosts; left out: what dp, tp and ep need");
  app->add_option("--dp", request.dp, "Data parallelism: batches; default 1");
  app->add_option("--tp", request.tp, "Tensor parallelism; default: the smallest that works");
  app->add_option("--ep", request.ep, "Expert parallelism; default 1");
  app->add_option("--cp", request.cp, "Context parallelism of attention; default 1");
  app->add_option("--outer-dp", request.outer_dp, "Complete replicas of the model");
  app->add_option("--attn-dp", request.attn_dp, "Batches within a replica");
  app->add_option("--attn-tp", request.attn_tp, "Tensor parallelism of attention");
  app->add_option("--attn-cp", request.attn_cp, "Context parallelism of attention");
  app->add_option("--mlp-tp", request.mlp_tp, "Tensor parallelism of the experts");
  app->add_option("--transport", command->transport, "The exchange's; one that cannot leave a host is refused with several")
      ->capture_default_str();
  app->add_option("--preset", command->preset, "A published model: also show which of its experts each rank holds");
  app->add_option("--experts", command->experts, "Also show which of so many experts each rank holds");
  app->add_option("--expert-width", command->expert_width, "With --experts: also the rows of gate and up");
  app->add_option("--json", command->json_path, "Write JSON to this file, or for - to the terminal instead of text");
  app->footer(
      "Examples:\n"
      "  tokenyard parallel --tp 8 --ep 4 --nnodes 2\n"
      "  tokenyard parallel --tp 8 --ep 4 --nnodes 2 --json -\n"
      "  tokenyard parallel --device-count 16 --dp 2 --ep 8 --outer-dp 2\n"
      "  tokenyard parallel --dp 16 --ep 16 --nnodes 2 --preset deepseek-v3");
  app->callback([app, command] { run_parallel(*app, *command); });
}

}  // namespace tokenyard::cli
