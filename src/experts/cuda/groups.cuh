#pragma once
// Where the places of each group are, as device code reads it.

#include "experts/cuda/grouped.h"

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
