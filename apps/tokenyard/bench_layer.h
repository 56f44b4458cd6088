#pragma once
// The settings of bench layer, between the command and its ranks.

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace tokenyard::cli {

struct LayerSettings {
  int ranks = 2;
  std::string preset = "deepseek-v3";
  std::int64_t tokens = 4096;  // of each rank
  std::string mode;            // empty: by mode_for_step()
  int sm_budget = 0;
  int iterations = 50;
  int warmup = 5;
  int timeout_ms = 100'000;
};

nlohmann::json to_json(const LayerSettings& settings);
LayerSettings layer_settings_from_json(const nlohmann::json& settings);

}  // namespace tokenyard::cli
