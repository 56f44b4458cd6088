#include "experts/cuda/hopper.cuh"
#include "experts/cuda/kernels.h"

namespace tokenyard::experts_cuda {
namespace {

using namespace hopper;  // NOLINT(google-build-using-namespace): this file is a part of it
using Rows = Operands<cutlass::bfloat16_t, RowMajor, RowMajor>;
using Chosen = Kernel<Rows, cutlass::bfloat16_t, NarrowBlocks>;
const cuda::Preloaded preloaded({{cutlass::device_kernel<Chosen::Gemm::GemmKernel>}});

}  // namespace

HopperKernel dgrad_narrow_bf16() { return {.workspace_bytes = workspace_bytes<Chosen>, .run = run<Chosen>}; }

}  // namespace tokenyard::experts_cuda
