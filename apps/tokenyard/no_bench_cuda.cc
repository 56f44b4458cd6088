// Instead of the benchmarks on GPUs, where device code is not built.

#include <nlohmann/json.hpp>

#include "bench_experts.h"
#include "core/usage.h"
#include "ranks.h"

namespace tokenyard::cli {

nlohmann::json bench_cuda_role(const World& /*world*/, const nlohmann::json& /*settings*/, Progress& /*progress*/) {
  usage_error("--device cuda: this build of tokenyard has no device code; configure it with -DTY_CUDA=ON, or use --device cpu");
}

nlohmann::json measure_experts(const ExpertsSettings& /*settings*/) {
  usage_error("bench experts: this build of tokenyard has no device code; configure it with -DTY_CUDA=ON on a machine with a GPU");
}

nlohmann::json bench_collective_role(const World& /*world*/, const nlohmann::json& /*settings*/, Progress& /*progress*/) {
  usage_error("bench collective: this build of tokenyard has no device code; configure it with -DTY_CUDA=ON");
}

nlohmann::json bench_layer_role(const World& /*world*/, const nlohmann::json& /*settings*/, Progress& /*progress*/) {
  usage_error("bench layer: this build of tokenyard has no device code; configure it with -DTY_CUDA=ON");
}

}  // namespace tokenyard::cli
