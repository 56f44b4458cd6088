// Instead of the benchmark on GPUs, where device code is not built.

#include <nlohmann/json.hpp>

#include "core/usage.h"
#include "ranks.h"

namespace tokenyard::cli {

nlohmann::json bench_cuda_role(const World& /*world*/, const nlohmann::json& /*settings*/, Progress& /*progress*/) {
  usage_error("--device cuda: this build of tokenyard has no device code; configure it with -DTY_CUDA=ON, or use --device cpu");
}

}  // namespace tokenyard::cli
