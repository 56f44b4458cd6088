#pragma once
// Products of experts on one GPU: what is measured, and where.

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "tokenyard/dtype.h"

namespace tokenyard::cli {

struct ProductShape {
  int outputs = 0;  // w [groups, outputs, inputs]
  int inputs = 0;
};
struct ExpertsSettings {
  int groups = 64;
  int rows = 2048;  // per group, on average
  std::vector<ProductShape> shapes = {{384, 2048}, {2048, 192}};
  Dtype dtype = Dtype::bfloat16;
  int sm_margin = 0;
  int warmup = 3;
  int iterations = 50;
};

// {"gpu", "ceilings", "baselines", "runs": [{"outputs", "inputs", "groups", "figures": {"forward": {...}, "dgrad", "wgrad"}}]}; groups:
// how rows are shared out among them, "even", "routed" or "skewed"; times are microseconds. UsageError without device code;
// std::runtime_error when a result is wrong.
nlohmann::json measure_experts(const ExpertsSettings& settings);

}  // namespace tokenyard::cli
