#pragma once
// Grouped products of float8 rows and weights with block scales: forward alone, and on Hopper alone.

#include "experts/cuda/grouped.h"
#include "tokenyard/quantise.h"

namespace tokenyard::experts_cuda {

constexpr std::int64_t scale_blocks(std::int64_t elements) { return (elements + kQuantiseBlock - 1) / kQuantiseBlock; }

// hopper.grouped: x and w float8_e4m3, y and bias of `out`, rows by place.
struct ScaledArgs {
  HopperArgs hopper;
  Dtype out = Dtype::bfloat16;       // or float16
  const float* x_scales = nullptr;   // [places, ceil(k / 128)], dense
  const float* w_scales = nullptr;   // [groups, ceil(n / 128), ceil(k / 128)], dense
  const float** a_scales = nullptr;  // [groups], filled on the device
  const float** b_scales = nullptr;
};
constexpr std::size_t kScaledTableBytesPerGroup = kTableBytesPerGroup + 2 * sizeof(const float*);

void fill_scaled_table(const ScaledArgs& args);

}  // namespace tokenyard::experts_cuda
