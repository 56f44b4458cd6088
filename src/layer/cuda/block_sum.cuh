#pragma once
// What the layer's kernels share: elements of a type that only the host knew, and sums over a block.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "tokenyard/dtype.h"

namespace tokenyard::layer_cuda {

constexpr int kThreads = 256;
constexpr int kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

__device__ __forceinline__ float read(Dtype dtype, const std::byte* row, std::int64_t at) {
  if (dtype == Dtype::bfloat16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[at]);
  if (dtype == Dtype::float16) return __half2float(reinterpret_cast<const __half*>(row)[at]);
  return reinterpret_cast<const float*>(row)[at];
}

// Over a block of kThreads, in an order that does not change; every thread gets the sum.
__device__ __forceinline__ float sum_of_block(float value) {
  __shared__ float sums[kThreads / kWarpThreads];
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) value = value + __shfl_xor_sync(kAllLanes, value, distance);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kWarpThreads == 0) sums[threadIdx.x / kWarpThreads] = value;
  __syncthreads();
  float sum = 0.0F;
  for (const float of_warp : sums) sum = sum + of_warp;
  return sum;
}

}  // namespace tokenyard::layer_cuda
