#include "bench_samples.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace tokenyard::cli {
namespace {

using nlohmann::json;

// An iteration takes as long as its slowest rank.
Samples slowest(const std::vector<json>& ranks) {
  Samples result;
  for (const json& rank : ranks) {
    for (const auto& [series, values] : rank["samples"].get<Samples>()) {
      std::vector<double>& worst = result[series];
      worst.resize(values.size(), 0);
      for (std::size_t i = 0; i < values.size(); ++i) worst[i] = std::max(worst[i], values[i]);
    }
  }
  return result;
}

}  // namespace

void add_phases(const std::string& series, const std::vector<PhaseSpan>& spans, Samples& samples) {
  for (const PhaseSpan& span : spans) {
    samples[series + kPhase + span.phase].push_back(static_cast<double>(span.end_ns - span.begin_ns) / 1e3);
  }
}

double quantile(std::vector<double> values, double part) {
  std::sort(values.begin(), values.end());
  return values[static_cast<std::size_t>(std::lround(part * static_cast<double>(values.size() - 1)))];
}

json summarise(const std::vector<json>& ranks) {
  std::int64_t all = 0, to_others = 0, busiest = 0, busiest_to_others = 0, sets = 1;
  for (const json& rank : ranks) {
    std::int64_t rows = 0, away = 0;
    const auto sent = rank["sent"].get<SentRows>();
    for (const auto& [set, counts] : sent) {
      rows += counts.first;
      away += counts.second;
    }
    sets = std::max<std::int64_t>(1, static_cast<std::int64_t>(sent.size()));
    all += rows;
    to_others += away;
    busiest = std::max(busiest, rows);
    busiest_to_others = std::max(busiest_to_others, away);
  }
  return {{"samples", slowest(ranks)},
          {"rows",
           {{"all_ranks", all / sets},
            {"to_other_ranks", to_others / sets},
            {"busiest_rank", busiest / sets},
            {"busiest_to_others", busiest_to_others / sets}}}};
}

}  // namespace tokenyard::cli
