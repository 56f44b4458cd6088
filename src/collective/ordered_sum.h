#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "collective/call.h"

namespace tokenyard::collective_internal {

// The sums of a reduce_scatter_v: rank order, from +0, float32 accumulators (float64 for float64), rounded once.
class OrderedSum {
 public:
  OrderedSum(int rank, int ranks) : rank_(rank), terms_(ranks), run_terms_(ranks) {}
  // terms()[p]: what rank p contributes to bytes [begin, begin + size) of this rank's rows; its own entry is not read.
  std::span<const std::byte*> terms() { return terms_; }
  // begin and size are multiples of the element size.
  void add(const Call& call, std::int64_t begin, std::int64_t size);

 private:
  int rank_;
  std::vector<const std::byte*> terms_;
  std::vector<const void*> run_terms_;
};

}  // namespace tokenyard::collective_internal
