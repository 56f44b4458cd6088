#pragma once
// Grouped products of float8 rows and weights with block scales: forward alone, and on Hopper alone.

#include "experts/cuda/grouped.h"

namespace tokenyard::experts_cuda {

constexpr int kScaleBlock = 128;
constexpr std::int64_t scale_blocks(std::int64_t elements) { return (elements + kScaleBlock - 1) / kScaleBlock; }

// hopper.grouped: x and w float8_e4m3, y and bias bfloat16, rows by place.
struct ScaledArgs {
  HopperArgs hopper;
  const float* x_scales = nullptr;   // [places, ceil(k / 128)], dense
  const float* w_scales = nullptr;   // [groups, ceil(n / 128), ceil(k / 128)], dense
  const float** a_scales = nullptr;  // [groups], filled on the device
  const float** b_scales = nullptr;
};
constexpr std::size_t kScaledTableBytesPerGroup = kTableBytesPerGroup + 2 * sizeof(const float*);

void fill_scaled_table(const ScaledArgs& args);
// In hopper_forward_fp8.cu, or no_hopper.cc.
bool has_scaled_product();
std::size_t scaled_workspace_bytes(const ScaledArgs& args);
bool run_scaled_product(const ScaledArgs& args);

}  // namespace tokenyard::experts_cuda
