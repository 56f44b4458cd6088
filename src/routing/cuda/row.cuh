#pragma once
// One token's logits in shared memory, one warp for each token. As RowScores, and in its order where order decides bits.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "routing/arithmetic.h"
#include "routing/cuda/gate_kernels.h"

namespace tokenyard::routing_cuda {

using routing_internal::exp_of_negative;
using routing_internal::kMaxTopK;
using routing_internal::kNever;
using routing_internal::precedes;
using routing_internal::sigmoid;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

// Combines the lanes' values; every lane gets the result, whose order is fixed.
template <class Number, class Combine>
__device__ __forceinline__ Number across_lanes(Number value, Combine&& combine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}
template <class Number>
__device__ __forceinline__ Number sum_across_lanes(Number value) {
  return across_lanes(value, [](Number a, Number b) { return a + b; });
}

__device__ __forceinline__ std::int64_t read_id(const Ids& ids, std::int64_t token, int k) {
  const std::int64_t at = token * ids.row_stride + k * ids.k_stride;
  return ids.is_wide ? reinterpret_cast<const std::int64_t*>(ids.data)[at] : reinterpret_cast<const std::int32_t*>(ids.data)[at];
}
__device__ __forceinline__ void write_id(const Ids& ids, std::int64_t token, int k, int id) {
  const std::int64_t at = token * ids.row_stride + k * ids.k_stride;
  if (ids.is_wide) {
    reinterpret_cast<std::int64_t*>(ids.data)[at] = id;
  } else {
    reinterpret_cast<std::int32_t*>(ids.data)[at] = id;
  }
}

struct Row {
  const GateArgs& args;
  float* logits;  // [num_experts] in shared memory; kNever where not finite
  float* scores;  // [num_experts]
  float highest = kNever;

  // False when the token can have no expert. Of all lanes.
  __device__ __forceinline__ bool load(std::int64_t token) {
    __syncwarp();  // the last token's have been read
    const bool is_masked = args.mask != nullptr && args.mask[token * args.mask_stride] == 0;
    highest = kNever;
    for (int e = lane_index(); e < args.num_experts && !is_masked; e += kWarp) {
      const float logit = read(token * args.token_stride + e * args.expert_stride);
      logits[e] = isfinite(logit) ? logit : kNever;
      highest = fmaxf(highest, logits[e]);
    }
    highest = across_lanes(highest, [](float a, float b) { return fmaxf(a, b); });
    __syncwarp();
    return highest != kNever;
  }
  // Softmax or sigmoid of every logit. A softmax is summed in ascending order, as on the CPU: choices may hang on its bits.
  __device__ __forceinline__ void score(Score kind) {
    if (kind == Score::sigmoid) {
      for (int e = lane_index(); e < args.num_experts; e += kWarp) scores[e] = sigmoid(logits[e]);
      __syncwarp();
      return;
    }
    for (int e = lane_index(); e < args.num_experts; e += kWarp) scores[e] = exp_of_negative(logits[e] - highest);
    __syncwarp();
    float sum = 0.0F;
    for (int e = 0; e < args.num_experts; ++e) sum = sum + scores[e];  // by every lane: a broadcast
    __syncwarp();
    for (int e = lane_index(); e < args.num_experts; e += kWarp) scores[e] = scores[e] / sum;
    __syncwarp();
  }
  // 1 / the sum of the scores; 0 when all of them underflowed.
  __device__ __forceinline__ float inverse_sum() const {
    float sum = 0.0F;
    for (int e = lane_index(); e < args.num_experts; e += kWarp) sum = sum + scores[e];
    sum = sum_across_lanes(sum);
    return sum > 0.0F ? 1.0F / sum : 0.0F;
  }
  __device__ __forceinline__ double log_sum_exp() const {
    double sum = 0;
    for (int e = lane_index(); e < args.num_experts; e += kWarp) sum = sum + static_cast<double>(exp_of_negative(logits[e] - highest));
    return static_cast<double>(highest) + log(sum_across_lanes(sum));
  }

 private:
  __device__ __forceinline__ float read(std::int64_t at) const {
    if (args.dtype == Dtype::bfloat16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(args.logits)[at]);
    if (args.dtype == Dtype::float16) return __half2float(reinterpret_cast<const __half*>(args.logits)[at]);
    return reinterpret_cast<const float*>(args.logits)[at];
  }
};

// Shared memory of a warp: `arrays` of [num_experts] floats; and how many warps fit a block.
struct WarpLaunch {
  WarpLaunch(const GateArgs& args, int arrays) {
    constexpr int kMostShared = 48 * 1024, kMostWarps = 8, kMostBlocks = 2048;
    const int bytes = arrays * args.num_experts * static_cast<int>(sizeof(float));
    const int warps = std::clamp(kMostShared / bytes, 1, kMostWarps);
    threads = warps * kWarp;
    shared = warps * bytes;
    blocks = static_cast<unsigned>(std::clamp<std::int64_t>((args.num_tokens + warps - 1) / warps, 1, kMostBlocks));
  }
  int threads, shared;
  unsigned blocks;
};

// Calls fn(token, row, spare) for this warp's tokens; the row's array number 2, if there is one, is spare.
template <class Fn>
__device__ __forceinline__ void for_each_token(const GateArgs& args, int arrays, Fn&& fn) {
  extern __shared__ float shared[];
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  float* mine = shared + warp_index() * arrays * args.num_experts;
  Row row{args, mine, mine + args.num_experts};
  for (std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * warps + warp_index(); token < args.num_tokens;
       token += static_cast<std::int64_t>(gridDim.x) * warps) {
    fn(token, row, mine + 2 * args.num_experts);
  }
}

}  // namespace tokenyard::routing_cuda
