#pragma once
// A full expert tensor as blocks [rows, columns]: (expert, projection) of w13, its bias and scales; experts of the others.

#include "tokenyard/weights.h"

namespace tokenyard::weights_internal {

// What tensor parallelism cuts; held_by_first: nothing, and shard 0 holds it.
enum class Cut : std::uint8_t { rows, columns, held_by_first };

struct BlockShape {
  int blocks_per_expert = 1;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  Cut cut = Cut::rows;
};

// UsageError, naming the tensor, for sizes below 1 or a tensor of 2^63 elements or more.
BlockShape block_shape(ExpertTensor tensor, const ExpertShape& shape);

}  // namespace tokenyard::weights_internal
