// topo: what this machine and this build can do.

#include "tokenyard/topo.h"

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "channel.h"
#include "command.h"
#include "core/env.h"
#include "core/usage.h"
#include "machine.h"
#include "ranks.h"
#include "table.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

struct TopoCommand {
  int ranks = 2;
  bool as_json = false;
};

json backend_list() {
  json all = json::array();
  for (const Backend& backend : backends()) {
    all.push_back({{"name", backend.name},
                   {"kind", backend.kind},
                   {"availability", name(backend.availability)},
                   {"reason", backend.reason},
                   {"remedy", backend.remedy},
                   {"version", backend.version}});
  }
  return all;
}

json gpu_report() {
  const GpuTopology found = gpu_topology();
  json gpus = json::array();
  for (std::size_t gpu = 0; gpu < found.gpus.size(); ++gpu) {
    const Gpu& at = found.gpus[gpu];
    gpus.push_back({{"name", at.name},
                    {"bus_id", at.bus_id},
                    {"compute_capability", at.compute_capability},
                    {"num_sms", at.num_sms},
                    {"memory_bytes", at.memory_bytes},
                    {"peer_access", found.peer_access[gpu]}});
  }
  return gpus;
}

void print_gpus(const json& report) {
  const json& gpus = report["gpus"];
  if (gpus.empty()) return;
  std::vector<std::string> header = {"GPU", "name", "bus", "SMs", "memory"};
  for (std::size_t peer = 0; peer < gpus.size(); ++peer) header.push_back(fmt::format("addresses {}", peer));
  Table table(header);
  for (std::size_t gpu = 0; gpu < gpus.size(); ++gpu) {
    const json& at = gpus[gpu];
    std::vector<std::string> cells = {std::to_string(gpu), at["name"], at["bus_id"], std::to_string(at["num_sms"].get<int>()),
                                      bytes_text(at["memory_bytes"])};
    for (const json& access : at["peer_access"]) cells.emplace_back(access.get<bool>() ? "yes" : "no");
    table.add(cells);
  }
  fmt::print("{}usual sm_budget of an exchange: {} in throughput mode with {} ranks, one more than tokens in latency mode\n\n",
             table.text(), report["usual_sm_budget"].get<int>(), report["topology"]["ranks"].get<int>());
}

void print_text(const json& report) {
  const json& topology = report["topology"];
  fmt::print("{}, {} cores, {}\n\n", report["machine"]["cpu"].get<std::string>(), report["machine"]["cores"].get<int>(),
             bytes_text(report["machine"]["memory_bytes"]));
  std::vector<std::string> header = {"rank", "host"};
  for (std::size_t peer = 0; peer < topology["hosts"].size(); ++peer) header.push_back(fmt::format("link to {}", peer));
  Table links(header);
  for (std::size_t rank = 0; rank < topology["hosts"].size(); ++rank) {
    std::vector<std::string> cells = {std::to_string(rank), topology["hosts"][rank]};
    for (const json& link : topology["links"][rank]) cells.push_back(link);
    links.add(cells);
  }
  fmt::print("{}\n", links.text());
  print_gpus(report);
  Table table({"backend", "kind", "here"});
  for (const json& backend : report["backends"]) {
    const auto version = backend["version"].get<std::string>();
    table.add({backend["name"], backend["kind"], backend["availability"].get<std::string>() + (version.empty() ? "" : ", " + version)});
  }
  fmt::print("{}", table.text());
  for (const json& backend : report["backends"]) {
    const auto reason = backend["reason"].get<std::string>(), remedy = backend["remedy"].get<std::string>();
    if (reason.empty()) continue;
    fmt::print("{}: {}{}{}\n", backend["name"].get<std::string>(), reason, remedy.empty() ? "" : "; ", remedy);
  }
}

void run_topo(const TopoCommand& command) {
  if (command.ranks < 1 || command.ranks > Channel::kMaxRanks) {
    usage_error("--ranks {}: out of range; give a number from 1 to {}", command.ranks, Channel::kMaxRanks);
  }
  json topology;
  if (env("RANK")) {  // started by a launcher: the world is there
    Progress unused;
    const World world = World::from_env();
    topology = topo_role(world, {}, unused);
    if (world.rank() != 0) return;
  } else {
    topology =
        run_on_ranks({.role = "topo", .ranks = command.ranks, .runner = Runner::processes, .timeout_ms = 60'000, .label = "topo"}, {});
  }
  const json report = {{"machine", machine()},
                       {"versions", versions("")},
                       {"topology", topology},
                       {"gpus", gpu_report()},
                       {"usual_sm_budget", usual_sm_budget(Mode::throughput, topology["ranks"], 0)},
                       {"backends", backend_list()}};
  if (command.as_json) {
    fmt::print("{}\n", report.dump(1));
  } else {
    print_text(report);
  }
}

}  // namespace

json topo_role(const World& world, const json&, Progress&) {
  const Topology found = topology(world);
  json links = json::array();
  for (const auto& row : found.links) {
    json names = json::array();
    for (const LinkKind link : row) names.push_back(name(link));
    links.push_back(names);
  }
  return {{"ranks", found.ranks}, {"hosts", found.hosts}, {"links", links}};
}

void add_topo(CLI::App& program) {
  CLI::App* app = program.add_subcommand("topo", "Show ranks, their links, and what is available here, with reason and remedy");
  auto command = std::make_shared<TopoCommand>();
  app->add_option("--ranks", command->ranks, "Ranks to start; under a launcher its ranks are shown")->capture_default_str();
  app->add_flag("--json", command->as_json, "Print JSON");
  app->footer(
      "Examples:\n"
      "  tokenyard topo\n"
      "  tokenyard topo --ranks 4 --json\n"
      "  tokenyard launch -n 2 -- tokenyard topo");
  app->callback([command] { run_topo(*command); });
}

}  // namespace tokenyard::cli
