#include "experts/cuda/hopper_forward_fp8.cuh"
#include "experts/cuda/kernels.h"

namespace tokenyard::experts_cuda {
namespace {

using namespace hopper;  // NOLINT(google-build-using-namespace): this file is a part of it
using Chosen = Scaled<cutlass::bfloat16_t, ScaledPairsBlocks>;
const cuda::Preloaded preloaded({{cutlass::device_kernel<Chosen::Gemm::GemmKernel>}});

}  // namespace

ScaledKernel forward_fp8_pairs_to_bf16() { return {.workspace_bytes = scaled_workspace_bytes<Chosen>, .run = run_scaled<Chosen>}; }

}  // namespace tokenyard::experts_cuda
