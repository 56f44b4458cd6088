#pragma once
// The settings of bench collective, between the command and its ranks.

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace tokenyard::cli {

struct CollectiveSettings {
  int ranks = 2;
  std::int64_t rows = 4096;  // of each rank, unless uneven
  std::int64_t hidden_size = 7168;
  std::string dtype = "bfloat16";
  bool uneven = false;  // rank r has rows * (r + 1) / ranks
  int sm_budget = 0;
  std::int64_t staging_bytes = 16 << 20;
  int iterations = 50;
  int warmup = 5;
  int timeout_ms = 100'000;

  std::int64_t rows_of(int rank) const { return uneven ? rows * (rank + 1) / ranks : rows; }
};

nlohmann::json to_json(const CollectiveSettings& settings);
CollectiveSettings collective_settings_from_json(const nlohmann::json& settings);

}  // namespace tokenyard::cli
