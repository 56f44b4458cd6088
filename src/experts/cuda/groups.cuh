#pragma once
// Where the places of each group are, as device code reads it.

#include "experts/cuda/grouped.h"
#include "kernels/cuda/warp.cuh"

namespace tokenyard::experts_cuda {

struct Span {
  std::int64_t begin = 0;
  std::int64_t count = 0;
};

__device__ __forceinline__ std::int64_t begin_of(const Groups& groups, int group) {
  return groups.begins == nullptr ? group * groups.capacity : groups.begins[group];
}

// Cut to the places that there are, whatever the tables say: nobody can check them without waiting for the device.
__device__ __forceinline__ Span span_of(const Groups& groups, int group) {
  const std::int64_t begin = begin_of(groups, group);
  const std::int64_t room = begin < 0 || begin > groups.places ? 0 : groups.places - begin;
  const std::int64_t count = groups.counts[group];
  return {begin, count < 0 ? 0 : count < room ? count : room};
}

using cuda::kAllLanes;
using cuda::kLanes;
using cuda::lane_index;

// Neighbours are in one block, unlike those of cuda::grid_warp: they take rows that lie side by side.
__device__ __forceinline__ std::int64_t grid_warp() { return (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes; }
__device__ __forceinline__ std::int64_t grid_warps() { return static_cast<std::int64_t>(gridDim.x) * blockDim.x / kLanes; }

// Calls fn(place) for all places of all groups, each by one warp. By all warps of the grid; groups are looked at 32 at a time.
template <class Fn>
__device__ __forceinline__ void for_each_place(const Groups& groups, Fn&& fn) {
  std::int64_t number = grid_warp(), before = 0;  // of the places in groups, and of those in earlier groups
  for (int first = 0; first < groups.num_groups; first += kLanes) {
    const int group = first + lane_index();
    const Span span = group < groups.num_groups ? span_of(groups, group) : Span{};
    const std::int64_t end = before + cuda::inclusive_sum(span.count);
    before = __shfl_sync(kAllLanes, end, kLanes - 1);
    const std::int64_t shift = span.begin + span.count - end;  // from number to place
    for (; number < before; number += grid_warps()) {
      const int lane = __ffs(static_cast<int>(__ballot_sync(kAllLanes, number < end))) - 1;
      fn(number + __shfl_sync(kAllLanes, shift, lane));
    }
  }
}

// The group of a place; -1 for padding. Begins ascend.
__device__ __forceinline__ int group_of(const Groups& groups, std::int64_t place) {
  int low = 0, high = groups.num_groups;  // the last group that begins at or before it, and is not empty, is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (begin_of(groups, middle) <= place ? low : high) = middle;
  }
  for (; low >= 0; --low) {  // empty groups begin where the next one does
    const Span span = span_of(groups, low);
    if (place < span.begin) continue;
    if (place < span.begin + span.count) return low;
    if (span.count > 0) return -1;
  }
  return -1;
}

}  // namespace tokenyard::experts_cuda
