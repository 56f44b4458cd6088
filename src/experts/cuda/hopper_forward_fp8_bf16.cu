#include "experts/cuda/hopper_forward_fp8.cuh"
#include "experts/cuda/kernels.h"

namespace tokenyard::experts_cuda {

ScaledKernel forward_fp8_to_bf16() {
  return {hopper::scaled_workspace_bytes<cutlass::bfloat16_t>, hopper::run_scaled<cutlass::bfloat16_t>};
}

}  // namespace tokenyard::experts_cuda
