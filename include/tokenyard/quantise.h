#pragma once
// Block quantisation to fp8 e4m3, per block of 128 elements of a row (the last block may be short).
// a = max(max|x|, 1e-4); q = e4m3(x * (448 / a)), nearest even, saturating; scale = a / 448; IEEE float32 throughout.
// Infinities and NaN become NaN (0x7f); the maximum is over the other elements of the block.

#include "tokenyard/tensor_view.h"

namespace tokenyard {

inline constexpr int kQuantiseBlock = 128;

enum class ScaleFormat : std::uint8_t {
  float32,       // scale = a / 448
  float32_pow2,  // "round_scale": scale = 2^ceil(log2(a / 448)), q = e4m3(x / scale)
  ue8m0,         // the rounded scale as its biased exponent, four per int32, lowest byte first
};

// Scale elements of one row: ceil(hidden_size / 128) float32, or that number / 4 (rounded up) int32 for ue8m0.
std::int64_t scale_columns(std::int64_t hidden_size, ScaleFormat format);

// x [T,H] bfloat16, float16 or float32; q [T,H] float8_e4m3; scales [T, scale_columns] float32 or int32, any strides.
// Unused bytes of the last ue8m0 word are 0. UsageError for anything else.
void quantise(const ConstTensorView& x, const TensorView& q, const TensorView& scales, ScaleFormat format);
// The inverse: x = q * scale in float32, then rounded to x's dtype.
void dequantise(const ConstTensorView& q, const ConstTensorView& scales, const TensorView& x, ScaleFormat format);

}  // namespace tokenyard
