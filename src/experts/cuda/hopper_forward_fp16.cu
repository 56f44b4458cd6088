#include "experts/cuda/hopper.cuh"
#include "experts/cuda/kernels.h"

namespace tokenyard::experts_cuda {
namespace {

using namespace hopper;  // NOLINT(google-build-using-namespace): this file is a part of it
using Rows = Operands<cutlass::half_t, RowMajor, ColumnMajor>;
using Chosen = Kernel<Rows, cutlass::half_t, WideBlocks>;
const cuda::Preloaded preloaded({{cutlass::device_kernel<Chosen::Gemm::GemmKernel>}});

}  // namespace

HopperKernel forward_fp16() { return {.workspace_bytes = workspace_bytes<Chosen>, .run = run<Chosen>}; }

}  // namespace tokenyard::experts_cuda
