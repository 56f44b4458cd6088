#pragma once
// A thread's place in its warp and block, and sums over a warp.

namespace tokenyard::cuda {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kLanes; }
__device__ inline int warps_of_block() { return static_cast<int>(blockDim.x) / kLanes; }
__device__ inline unsigned lanes_below() { return (1U << lane_index()) - 1; }

// Sum over the lanes before this one, and this one.
template <class Number>
__device__ inline Number inclusive_sum(Number value) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const Number before = __shfl_up_sync(kAllLanes, value, distance);
    if (lane_index() >= distance) value += before;
  }
  return value;
}

}  // namespace tokenyard::cuda
