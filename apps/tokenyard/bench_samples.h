#pragma once
// What the ranks of a benchmark measured, put together.

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "tokenyard/exchange.h"

namespace tokenyard::cli {

using Samples = std::map<std::string, std::vector<double>>;             // series -> microseconds per iteration
inline constexpr const char* kPhase = " / ";                            // between a series and its phase: "dispatch / dispatch rows"
using SentRows = std::map<int, std::pair<std::int64_t, std::int64_t>>;  // input set -> rows to all ranks, and to other ranks

// The phases of a call that was measured as `series`.
void add_phases(const std::string& series, const std::vector<PhaseSpan>& spans, Samples& samples);

// ranks: {"samples": Samples, "sent": SentRows} of each. {"samples": the slowest rank of every iteration, "rows": means over input sets
// of "all_ranks", "to_other_ranks", "busiest_rank", "busiest_to_others"}.
nlohmann::json summarise(const std::vector<nlohmann::json>& ranks);

// 0 <= part <= 1 of the sorted values.
double quantile(std::vector<double> values, double part);

}  // namespace tokenyard::cli
