// What the demo found, as one value, and as text for the terminal.

#include <fmt/core.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "check.h"
#include "demo.h"
#include "machine.h"
#include "table.h"
#include "tokenyard/routing.h"

namespace tokenyard::cli {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(DemoSettings, ranks, preset, tokens, batch_tokens, hidden_size, expert_width, dtype, threads, seed,
                                   timeout_ms)

namespace {

using nlohmann::json;

constexpr const char* kPhases[] = {"embed", "route", "dispatch", "experts", "combine", "check"};

// Per phase: every batch takes as long as its slowest rank.
json phase_figures(const json& ranks) {
  json figures = json::array();
  for (const char* name : kPhases) {
    std::vector<double> slowest;
    for (const json& rank : ranks) {
      const auto mine = rank["phases_us"].value(name, std::vector<double>());
      slowest.resize(mine.size(), 0);
      for (std::size_t b = 0; b < mine.size(); ++b) slowest[b] = std::max(slowest[b], mine[b]);
    }
    std::sort(slowest.begin(), slowest.end());
    figures.push_back({{"phase", name},
                       {"min_us", slowest.front()},
                       {"median_us", slowest[slowest.size() / 2]},
                       {"max_us", slowest.back()},
                       {"total_us", std::accumulate(slowest.begin(), slowest.end(), 0.0)}});
  }
  return figures;
}

// Spans of all ranks on one clock that starts with the batch. Checking is the demo's, not the layer's: it is left out.
json joined_timeline(const json& ranks) {
  json spans = json::array();
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    for (json span : ranks[rank]["timeline"]) {
      if (span["phase"] == "check") continue;
      span["rank"] = rank;
      spans.push_back(std::move(span));
    }
  }
  double start = spans.empty() ? 0 : spans[0]["begin_us"].get<double>();
  for (const json& span : spans) start = std::min(start, span["begin_us"].get<double>());
  for (json& span : spans) {
    for (const char* end : {"begin_us", "end_us"}) span[end] = span[end].get<double>() - start;
  }
  return spans;
}

template <class T>
T total_of(const json& ranks, const char* key) {
  T total = 0;
  for (const json& rank : ranks) total += rank[key].get<T>();
  return total;
}

json checks_of(const DemoSettings& settings, const json& ranks) {
  std::string fault;
  double largest = 0;
  for (const json& rank : ranks) {
    if (fault.empty()) fault = rank["fault"];
    largest = std::max(largest, rank["largest_error"].get<double>());
  }
  return {{"ok", fault.empty()},
          {"fault", fault},
          {"rows_checked", total_of<std::int64_t>(ranks, "rows_checked")},
          {"outputs_checked", total_of<std::int64_t>(ranks, "outputs_checked")},
          {"rows", "every row that arrived at an expert, bit for bit against the text's embedding"},
          {"outputs", "every output element against the sum of its experts in double, computed by one process without the exchange"},
          {"tolerance", Checker::tolerance(parse_dtype(settings.dtype))},
          {"tolerance_of", "the sum of the magnitudes of an element's terms"},
          {"largest_error", largest}};
}

json load_of(const json& ranks) {
  json load = json::array();
  int first_expert = 0;
  for (const json& rank : ranks) {
    const auto counts = rank["load"].get<std::vector<std::int64_t>>();
    load.push_back({{"first_expert", first_expert},
                    {"rows_per_expert", counts},
                    {"expert_rows", std::accumulate(counts.begin(), counts.end(), std::int64_t{0})},
                    {"rows_received", rank["rows_received"]}});
    first_expert += static_cast<int>(counts.size());
  }
  return load;
}

// One block character per expert; the full block is the busiest expert of all.
std::string strip(const std::vector<std::int64_t>& counts, std::int64_t busiest) {
  constexpr const char* kBlocks[] = {"·", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  std::string text;
  for (const std::int64_t count : counts) text += kBlocks[count == 0 ? 0 : 1 + count * 7 / std::max<std::int64_t>(busiest, 1)];
  return text;
}

std::string load_text(const json& report) {
  const json& summary = report["load_summary"];
  Table table({"", "experts", "", "rows", "expert rows", "of mean"});
  int rank = 0;
  for (const json& load : report["load"]) {
    const auto counts = load["rows_per_expert"].get<std::vector<std::int64_t>>();
    const int first = load["first_expert"];
    const double ratio = load["expert_rows"].get<double>() / summary["mean_expert_rows_per_rank"].get<double>();
    table.add({fmt::format("rank {}", rank++), counts.empty() ? "-" : fmt::format("{}-{}", first, first + std::ssize(counts) - 1),
               strip(counts, summary["busiest_expert_rows"]), count_text(load["rows_received"]), count_text(load["expert_rows"]),
               fmt::format("{:.2f} x", ratio)});
  }
  return fmt::format("load per expert (a full bar: {} rows, {:.1f} x the mean, expert {})\n", count_text(summary["busiest_expert_rows"]),
                     summary["busiest_expert_of_mean"].get<double>(), summary["busiest_expert"].get<int>()) +
         table.text();
}

std::string link_text(const json& report) {
  std::vector<std::string> header = {"from"};
  for (std::size_t rank = 0; rank < report["link_bytes"].size(); ++rank) header.push_back(fmt::format("to rank {}", rank));
  Table table(header);
  int rank = 0;
  for (const json& row : report["link_bytes"]) {
    std::vector<std::string> cells = {fmt::format("rank {}", rank++)};
    for (const json& bytes : row) cells.push_back(bytes_text(bytes));
    table.add(cells);
  }
  return "bytes per link, dispatch and combine (the diagonal stays on its rank)\n" + table.text();
}

std::string phase_text(const json& report) {
  Table table({"", "min", "median", "max", "total"});
  for (const json& phase : report["phases"]) {
    table.add({phase["phase"], time_text(phase["min_us"]), time_text(phase["median_us"]), time_text(phase["max_us"]),
               time_text(phase["total_us"])});
  }
  return fmt::format("time per batch, slowest rank ({} batches)\n", report["batches"].get<int>()) + table.text();
}

json load_summary(const json& load, int num_experts) {
  std::int64_t busiest = 0, total = 0;
  int expert = 0;
  for (const json& rank : load) {
    const auto counts = rank["rows_per_expert"].get<std::vector<std::int64_t>>();
    total += rank["expert_rows"].get<std::int64_t>();
    for (std::size_t l = 0; l < counts.size(); ++l) {
      if (counts[l] <= busiest) continue;
      busiest = counts[l];
      expert = rank["first_expert"].get<int>() + static_cast<int>(l);
    }
  }
  const double mean = static_cast<double>(total) / num_experts;
  return {{"busiest_expert", expert},
          {"busiest_expert_rows", busiest},
          {"busiest_expert_of_mean", static_cast<double>(busiest) / mean},
          {"mean_rows_per_expert", mean},
          {"mean_expert_rows_per_rank", static_cast<double>(total) / static_cast<double>(load.size())},
          {"expert_rows", total}};
}

}  // namespace

json to_json(const DemoSettings& settings) { return settings; }
DemoSettings demo_settings_from_json(const json& settings) { return settings.get<DemoSettings>(); }

json demo_report(const DemoSettings& settings, const DemoText& text, const json& ranks, double seconds) {
  const ModelPreset& preset = model_preset(settings.preset);
  const json load = load_of(ranks);
  json link_bytes = json::array();
  for (const json& rank : ranks) link_bytes.push_back(rank["link_bytes"]);
  return {{"format", "tokenyard-demo-1"},
          {"settings", to_json(settings)},
          {"text", {{"source", text.source}, {"bytes", text.bytes.size()}}},
          {"preset", {{"name", preset.name}, {"experts", preset.num_experts}, {"top_k", preset.top_k}}},
          {"machine", machine()},
          {"versions", versions("")},
          {"seconds", seconds},
          {"batches", ranks[0]["phases_us"]["embed"].size()},
          {"checks", checks_of(settings, ranks)},
          {"load", load},
          {"load_summary", load_summary(load, preset.num_experts)},
          {"rows_sent", total_of<std::int64_t>(ranks, "rows_sent")},
          {"link_bytes", link_bytes},
          {"phases", phase_figures(ranks)},
          {"timeline", joined_timeline(ranks)}};
}

std::string demo_summary(const json& report) {
  const json& settings = report["settings"];
  const json& checks = report["checks"];
  const json& preset = report["preset"];
  std::string text = fmt::format(
      "text    {} bytes: {}\nlayer   {}: {} experts, top-{}; rows of {} {}, expert width {} (the model's routing, smaller rows)\n"
      "ranks   {} processes, {} tokens each per batch\n\n",
      count_text(report["text"]["bytes"]), report["text"]["source"].get<std::string>(), preset["name"].get<std::string>(),
      preset["experts"].get<int>(), preset["top_k"].get<int>(), settings["hidden_size"].get<int>(), settings["dtype"].get<std::string>(),
      settings["expert_width"].get<int>(), settings["ranks"].get<int>(), settings["batch_tokens"].get<int>());
  text += load_text(report) + "\n" + link_text(report) + "\n" + phase_text(report) + "\n";
  if (!checks["ok"].get<bool>()) return text;
  return text + fmt::format(
                    "checked {} rows at experts, bit for bit; {} output rows against one process without the exchange:\n"
                    "        largest error {:.1e} of an element's terms, {:.1e} allowed\n",
                    count_text(checks["rows_checked"]), count_text(checks["outputs_checked"]), checks["largest_error"].get<double>(),
                    checks["tolerance"].get<double>());
}

}  // namespace tokenyard::cli
