#include "bench_report.h"

#include <fmt/core.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "bench_samples.h"
#include "core/usage.h"
#include "files.h"
#include "machine.h"
#include "table.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

// The rows of the table: which samples make a figure, what it is compared with, and how many bytes it moves.
struct Figure {
  const char* name;
  const char* label;
  std::vector<const char*> samples;  // added per iteration
  std::vector<const char*> limit;
  std::vector<const char*> baseline;
  std::vector<const char*> plain;
};

std::vector<Figure> figures_of(const json& samples) {
  const bool pulled = samples.contains("combine");
  std::vector<Figure> figures = {{"dispatch", "dispatch", {"dispatch"}, {"memcpy_dispatch"}, {"baseline_dispatch"}, {"plain_dispatch"}}};
  const char* combine = pulled ? "combine" : "combine_copy";
  if (pulled) {
    figures.push_back(
        {"combine", "combine, rows in expert_rows()", {"combine"}, {"memcpy_combine"}, {"baseline_combine"}, {"plain_combine"}});
  }
  figures.push_back({"combine_copy",
                     "combine, rows in the caller's memory",
                     {"combine_copy"},
                     {"memcpy_combine"},
                     {"baseline_combine"},
                     {"plain_combine"}});
  figures.push_back({"dispatch_and_combine",
                     pulled ? "dispatch + combine from expert_rows()" : "dispatch + combine",
                     {"dispatch", combine},
                     {"memcpy_dispatch", "memcpy_combine"},
                     {"baseline_dispatch", "baseline_combine"},
                     {"plain_dispatch", "plain_combine"}});
  if (samples.contains("graph")) {
    figures.push_back({"graph",
                       "dispatch + combine, a graph replayed",
                       {"graph"},
                       {"memcpy_dispatch", "memcpy_combine"},
                       {"baseline_dispatch", "baseline_combine"},
                       {}});
  }
  return figures;
}

std::vector<double> added(const json& samples, const std::vector<const char*>& series) {
  std::vector<double> total;
  for (const char* name : series) {
    if (!samples.contains(name)) return {};
    const auto values = samples[name].get<std::vector<double>>();
    total.resize(values.size(), 0);
    for (std::size_t i = 0; i < values.size(); ++i) total[i] += values[i];
  }
  return total;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

// What one GPU sends or receives over NVLink at best, measured between two H200 (docs/kernels.md).
constexpr double kLinkBytesPerMicrosecond = 370e3;

json figure_of(const Figure& figure, const json& measured) {
  const json& samples = measured["samples"];
  const bool on_gpus = measured.contains("gpu");
  const std::vector<double> times = added(samples, figure.samples);
  std::int64_t row_bytes = 0;
  for (const char* name : figure.limit) {
    row_bytes += measured[std::string(name) == "memcpy_dispatch" ? "dispatch_row_bytes" : "combine_row_bytes"].get<std::int64_t>();
  }
  const json& rows = measured["rows"];
  const double middle = median(times);
  const double limit = on_gpus ? static_cast<double>(rows["busiest_to_others"].get<std::int64_t>() * row_bytes) / kLinkBytesPerMicrosecond
                               : median(added(samples, figure.limit));
  const std::int64_t bytes = rows["all_ranks"].get<std::int64_t>() * row_bytes;
  json result = {{"label", figure.label},
                 {"min_us", *std::min_element(times.begin(), times.end())},
                 {"median_us", middle},
                 {"max_us", *std::max_element(times.begin(), times.end())},
                 {"bytes_all_ranks", bytes},
                 {"bytes_busiest_rank", rows["busiest_rank"].get<std::int64_t>() * row_bytes},
                 {"bytes_to_other_ranks", rows["to_other_ranks"].get<std::int64_t>() * row_bytes},
                 {"gigabytes_per_second", static_cast<double>(bytes) / middle / 1e3},
                 {"limit_us", limit},
                 {"ratio_to_limit", limit / middle}};
  if (const std::vector<double> baseline = added(samples, figure.baseline); !baseline.empty()) {
    result["baseline_us"] = median(baseline);
    result["ratio_to_baseline"] = median(baseline) / middle;
  }
  if (const std::vector<double> plain = added(samples, figure.plain); !plain.empty()) {
    result["plain_us"] = median(plain);
    result["ratio_to_plain"] = median(plain) / middle;
  }
  return result;
}

// Where a call's time goes: a row per phase, in the alphabet's order.
std::string phase_table(const json& samples) {
  Table table({"phase", "min", "median", "max"});
  bool any = false;
  for (const auto& [series, values] : samples.items()) {
    if (series.find(kPhase) == std::string::npos) continue;
    const auto times = values.get<std::vector<double>>();
    table.add({series, time_text(*std::min_element(times.begin(), times.end())), time_text(median(times)),
               time_text(*std::max_element(times.begin(), times.end()))});
    any = true;
  }
  return any ? "\n" + table.text() : "";
}

json definitions(bool on_gpus) {
  if (on_gpus) {
    return {
        {"time", "per iteration the slowest rank, by events on the stream, from behind an untimed barrier of all GPUs to valid outputs"},
        {"limit_us", "rows that the busiest rank sends to other ranks x row bytes (scales included) / 370 GB/s"},
        {"ratio_to_limit", "limit_us / median_us"},
        {"ratio_to_baseline",
         "baseline_us / median_us: how many times faster than the collective exchange over NCCL, in the same processes and iterations; "
         "its dispatch waits for counts on the host, which is part of its time"},
        {"dispatch_and_combine", "the sum of both, added per iteration"},
        {"graph", "one launch of a CUDA graph of both calls, capacity sizing only; the baseline is the sum of its two calls"}};
  }
  return {{"time", "per iteration the slowest rank, from an untimed barrier to valid outputs; min, median, max over iterations"},
          {"bytes_all_ranks",
           "rows that all ranks send, to themselves included, x row bytes (scales included): on a CPU all of it is "
           "memory traffic; mean over input sets"},
          {"bytes_to_other_ranks", "the same without rows that stay on their rank"},
          {"limit_us",
           "in the same run and iteration, all ranks at once copy as many bytes as they send (to themselves included) with "
           "std::memcpy and as many threads, from one buffer to another; median"},
          {"ratio_to_limit", "limit_us / median_us"},
          {"ratio_to_baseline",
           "baseline_us / median_us: how many times faster than the collective exchange over MPI, in the same "
           "processes and iterations"},
          {"ratio_to_plain", "plain_us / median_us: the same against the exchange over MPI as it is commonly written (baseline.plain)"},
          {"dispatch_and_combine", "the sum of both, added per iteration"}};
}

}  // namespace

json bench_report(const Settings& settings, Runner runner, const std::string& no_baseline, const json& measured) {
  json figures = json::object();
  for (const Figure& figure : figures_of(measured["samples"])) figures[figure.name] = figure_of(figure, measured);
  json baseline = {{"measured", no_baseline.empty()}};
  if (no_baseline.empty() && measured.contains("gpu")) {
    baseline["what"] =
        "the exchange over NCCL, deduplicated: counts in an all-gather, one host wait, rows packed per destination, records and rows in "
        "one "
        "group of sends and receives, which land in place; token_major and weighting none whatever the exchange does; this rank's own rows "
        "are "
        "not sent, y is sent from where it lies, one kernel adds up";
    baseline["library"] = measured["baseline_library"];
  } else if (no_baseline.empty()) {
    baseline["what"] =
        "the same exchange with Transport::mpi, deduplicated, which leaves out what it can: this rank's own rows are neither packed nor "
        "sent, large rows arrive where they stay, partial sums leave from where they are";
    if (measured["samples"].contains("plain_dispatch")) {
      baseline["plain"] =
          "all rows packed per destination, deduplicated; counts; rows and records in MPI all-to-all-v; unpacked; and back the same way";
    }
  } else {
    baseline["why_not"] = no_baseline;
  }
  return {{"format", kBenchFormat},
          {"kind", "run"},
          {"settings", to_json(settings)},
          {"ranks_as", describe(runner)},
          {"transport", measured["transport"]},
          {"machine", machine()},
          {"versions", versions(runner == Runner::mpirun ? find_mpirun() : "")},
          {"baseline", baseline},
          {"weighting", name(weighting_of(parse_layout(settings.layout)))},
          {"input_sets", kInputSets},
          {"checked", "rows, metadata and sums of the first input set, against the seed"},
          {"gpu", measured.value("gpu", json())},
          {"definitions", definitions(measured.contains("gpu"))},
          {"figures", figures},
          {"samples_us", measured["samples"]}};
}

std::string baseline_name(const json& run) { return run.value("gpu", json()).is_null() ? "MPI" : "NCCL"; }
std::string limit_name(const json& run) { return run.value("gpu", json()).is_null() ? "memcpy" : "link"; }

std::string bench_table(const json& report) {
  const json& machine = report["machine"];
  std::string text = fmt::format("{}\n{} over {} on {} ({} cores), {} thread(s) per rank, {} iterations; results checked\n\n",
                                 describe(settings_from_json(report["settings"])), report["ranks_as"].get<std::string>(),
                                 report["transport"].get<std::string>(), machine["cpu"].get<std::string>(), machine["cores"].get<int>(),
                                 report["settings"]["threads"].get<int>(), report["settings"]["iterations"].get<int>());
  const bool baseline = report["baseline"]["measured"];
  const bool on_gpus = !report["gpu"].is_null();
  std::vector<std::string> header = {"", "min", "median", "max", "bytes", "GB/s"};
  header.insert(header.end(), {limit_name(report), "of " + limit_name(report)});
  const bool plain = report["baseline"].contains("plain");
  if (plain) header.insert(header.end(), {"plain MPI", "vs plain"});
  if (baseline) header.insert(header.end(), {on_gpus ? "NCCL" : "tuned MPI", on_gpus ? "vs NCCL" : "vs tuned"});
  Table table(header);
  for (const char* name : {"dispatch", "combine", "combine_copy", "dispatch_and_combine"}) {
    if (!report["figures"].contains(name)) continue;
    const json& figure = report["figures"][name];
    std::vector<std::string> cells = {figure["label"],
                                      time_text(figure["min_us"]),
                                      time_text(figure["median_us"]),
                                      time_text(figure["max_us"]),
                                      bytes_text(figure["bytes_all_ranks"]),
                                      fmt::format("{:.2f}", figure["gigabytes_per_second"].get<double>()),
                                      time_text(figure["limit_us"]),
                                      fmt::format("{:.0f} %", 100 * figure["ratio_to_limit"].get<double>())};
    if (plain) {
      cells.push_back(time_text(figure["plain_us"]));
      cells.push_back(fmt::format("{:.2f} x", figure["ratio_to_plain"].get<double>()));
    }
    if (baseline) {
      cells.push_back(time_text(figure["baseline_us"]));
      cells.push_back(fmt::format("{:.2f} x", figure["ratio_to_baseline"].get<double>()));
    }
    table.add(cells);
  }
  text += table.text() + phase_table(report["samples_us"]);
  if (on_gpus) {
    const json& gpu = report["gpu"];
    return text +
           fmt::format(
               "\n{} x {}, {} multiprocessors; bytes: rows of all ranks, to themselves included; link: what the busiest rank sends to "
               "others at 370 GB/s\n",
               gpu["count"].get<int>(), gpu["name"].get<std::string>(), gpu["sm_budget"].get<int>()) +
           (baseline ? fmt::format("NCCL: the collective exchange over {}, deduplicated, in the same processes and iterations\n",
                                   report["baseline"]["library"].get<std::string>())
                     : fmt::format("no NCCL baseline: {}\n", report["baseline"]["why_not"].get<std::string>()));
  }
  text += "\nbytes: rows of all ranks, to themselves included; memcpy: all ranks copy the same bytes at once, in the same run\n";
  if (plain) text += "plain MPI: pack, counts, all-to-all-v, unpack, deduplicated, in the same processes and iterations\n";
  text += baseline ? "tuned MPI: the same, without the copies that can be left out (Transport::mpi of the library)\n"
                   : fmt::format("no MPI baseline: {}\n", report["baseline"]["why_not"].get<std::string>());
  return text;
}

json read_runs(const std::string& path) {
  const json content = json::parse(read_file("FILE", path), nullptr, false);
  if (!content.is_object() || content.value("format", "") != kBenchFormat) {
    usage_error("{}: is no file of 'tokenyard bench --json' (format {}); write one with it", path, kBenchFormat);
  }
  return content["kind"] == "sweep" ? content["runs"] : json::array({content});
}

}  // namespace tokenyard::cli
