#pragma once
// What a norm's tensors must be, wherever it is computed: UsageErrors.

#include "tokenyard/norm.h"

namespace tokenyard::layer_internal {

// The rows of a matrix.
std::int64_t rows_in(const char* what, const ConstTensorView& view);
void check_norm(const ResidualInput& input, const RmsNorm& norm, const NormOutput& output);
void check_norm_backward(const NormGradient& input, const RmsNorm& norm, const ConstTensorView& d_x, const ConstTensorView& d_weight);

// This rank's slice of T tokens.
struct SliceOf {
  std::vector<std::int64_t> counts;
  std::int64_t begin = 0;
  std::int64_t count = 0;
  SliceOf(const World& world, std::int64_t tokens);
};

}  // namespace tokenyard::layer_internal
