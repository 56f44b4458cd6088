// Rows to fp8 e4m3 with one scale per block, and back.

#include <algorithm>

#include "core/visit_dtype.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/quantise.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/cpu/simd_inl.h"

HWY_BEFORE_NAMESPACE();
namespace tokenyard::cpu::HWY_NAMESPACE {

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
using D8 = hn::Rebind<std::uint8_t, DF>;
constexpr int kLanes = hn::MaxLanes(DF());

// A block of `count` <= 128 elements as float32, the rest +0.
template <Dtype kDtype>
HWY_INLINE void decode_block(const Element<kDtype>* x, std::int64_t count, float* block) {
  HWY_ALIGN Element<kDtype> padded[kQuantiseBlock];
  if (count < kQuantiseBlock) {
    std::memset(padded, 0, sizeof(padded));
    std::memcpy(padded, x, static_cast<std::size_t>(count) * sizeof(padded[0]));
    x = padded;
  }
  for (int i = 0; i < kQuantiseBlock; i += kLanes) hn::Store(load<kDtype>(DF(), x + i), DF(), block + i);
}

// max(largest |x| of the numbers in the block, 1e-4). Bits of non-negative floats compare as integers.
HWY_INLINE float block_amax(const float* block) {
  const DI di;
  auto largest = hn::Set(di, std::bit_cast<std::int32_t>(1e-4f));
  for (int i = 0; i < kQuantiseBlock; i += kLanes) {
    const auto magnitude = hn::And(hn::BitCast(di, hn::Load(DF(), block + i)), hn::Set(di, 0x7fffffff));
    const auto is_number = hn::Lt(magnitude, hn::Set(di, 0x7f800000));
    largest = hn::Max(largest, hn::IfThenElseZero(is_number, magnitude));
  }
  HWY_ALIGN std::int32_t lanes[kLanes];
  hn::Store(largest, di, lanes);
  return std::bit_cast<float>(*std::max_element(lanes, lanes + kLanes));
}

HWY_INLINE hn::Vec<D8> float_to_e4m3(hn::Vec<DF> value) {
  const DI di;
  const auto bits = hn::BitCast(di, value);
  const auto magnitude = hn::And(bits, hn::Set(di, 0x7fffffff));
  const auto sign = hn::And(hn::ShiftRight<24>(bits), hn::Set(di, 0x80));
  const auto saturated = hn::Min(magnitude, hn::Set(di, 0x43e00000));  // 448
  const auto number = hn::Or(Float8E4m3::from_magnitude(di, saturated), sign);
  const auto is_number = hn::Lt(magnitude, hn::Set(di, 0x7f800000));
  return hn::DemoteTo(D8(), hn::IfThenElse(is_number, number, hn::Set(di, 0x7f)));
}

HWY_INLINE hn::Vec<DF> e4m3_to_float(hn::Vec<D8> raw) {
  const DI di;
  const auto bits = hn::PromoteTo(di, raw);
  const auto magnitude = hn::And(bits, hn::Set(di, 0x7f));
  const auto sign = hn::ShiftLeft<24>(hn::AndNot(magnitude, bits));
  const auto number = Float8E4m3::to_float_bits(di, magnitude);
  const auto is_nan = hn::Eq(magnitude, hn::Set(di, 0x7f));
  return hn::BitCast(DF(), hn::Or(hn::IfThenElse(is_nan, hn::Set(di, 0x7fc00000), number), sign));
}

// Writes the scale of block b; returns the factor that brings the block's elements to e4m3's range.
HWY_INLINE float write_scale(const QuantiseArgs& args, std::int64_t b, float amax) {
  constexpr float kLargest = 448.0f;
  float scale = amax / kLargest;
  float factor = kLargest / amax;
  if (args.format != ScaleFormat::float32) {
    const std::uint8_t exponent = float_to_ue8m0_ceil(scale);
    scale = ue8m0_to_float(exponent);
    factor = 1.0f / scale;  // exact, so that multiplying is dividing: scale is within 2^-22 .. 2^120
    if (args.format == ScaleFormat::ue8m0) {
      args.scales[b / 4 * args.scale_stride + b % 4] = std::byte{exponent};
      return factor;
    }
  }
  std::memcpy(args.scales + b * args.scale_stride, &scale, sizeof(scale));
  return factor;
}

template <Dtype kDtype>
void quantise_elements(const QuantiseArgs& args) {
  const auto* x = static_cast<const Element<kDtype>*>(args.x);
  HWY_ALIGN float block[kQuantiseBlock];
  HWY_ALIGN std::uint8_t padded[kQuantiseBlock];
  for (std::int64_t begin = 0; begin < args.elements; begin += kQuantiseBlock) {
    const std::int64_t count = std::min<std::int64_t>(args.elements - begin, kQuantiseBlock);
    decode_block<kDtype>(x + begin, count, block);
    const auto factor = hn::Set(DF(), write_scale(args, begin / kQuantiseBlock, block_amax(block)));
    std::uint8_t* q = count < kQuantiseBlock ? padded : args.q + begin;
    for (int i = 0; i < kQuantiseBlock; i += kLanes) {
      hn::StoreU(float_to_e4m3(hn::Mul(hn::Load(DF(), block + i), factor)), D8(), q + i);
    }
    if (q == padded) std::memcpy(args.q + begin, padded, static_cast<std::size_t>(count));
  }
}

void quantise_row(const QuantiseArgs& args) {
  if (args.format == ScaleFormat::ue8m0) {  // the last word may be short of scales
    for (std::int64_t w = 0; w < scale_columns(args.elements, args.format); ++w) std::memset(args.scales + w * args.scale_stride, 0, 4);
  }
  visit_summable(args.dtype, [&](auto dtype) {
    if constexpr (dtype.value != Dtype::float64) {
      quantise_elements<dtype.value>(args);
    } else {
      TY_ASSERT(dtype.value != Dtype::float64);
    }
  });
}

HWY_INLINE float read_scale(const DequantiseArgs& args, std::int64_t b) {
  if (args.format == ScaleFormat::ue8m0) {
    return ue8m0_to_float(std::to_integer<std::uint8_t>(args.scales[b / 4 * args.scale_stride + b % 4]));
  }
  float scale;
  std::memcpy(&scale, args.scales + b * args.scale_stride, sizeof(scale));
  return scale;
}

template <Dtype kDtype>
void dequantise_elements(const DequantiseArgs& args) {
  HWY_ALIGN std::uint8_t padded_q[kQuantiseBlock] = {};
  HWY_ALIGN Element<kDtype> padded_x[kQuantiseBlock];
  for (std::int64_t begin = 0; begin < args.elements; begin += kQuantiseBlock) {
    const std::int64_t count = std::min<std::int64_t>(args.elements - begin, kQuantiseBlock);
    const bool full = count == kQuantiseBlock;
    const auto scale = hn::Set(DF(), read_scale(args, begin / kQuantiseBlock));
    Element<kDtype>* row = static_cast<Element<kDtype>*>(args.x) + begin;
    if (!full) std::memcpy(padded_q, args.q + begin, static_cast<std::size_t>(count));
    const std::uint8_t* q = full ? args.q + begin : padded_q;
    Element<kDtype>* x = full ? row : padded_x;
    for (int i = 0; i < kQuantiseBlock; i += kLanes) {
      store<kDtype>(DF(), hn::Mul(e4m3_to_float(hn::LoadU(D8(), q + i)), scale), x + i);
    }
    if (!full) std::memcpy(row, padded_x, static_cast<std::size_t>(count) * sizeof(row[0]));
  }
}

void dequantise_row(const DequantiseArgs& args) {
  visit_summable(args.dtype, [&](auto dtype) {
    if constexpr (dtype.value != Dtype::float64) {
      dequantise_elements<dtype.value>(args);
    } else {
      TY_ASSERT(dtype.value != Dtype::float64);
    }
  });
}

}  // namespace tokenyard::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tokenyard::cpu {

HWY_EXPORT(quantise_row);
HWY_EXPORT(dequantise_row);

void quantise_row(const QuantiseArgs& args) { HWY_DYNAMIC_DISPATCH(quantise_row)(args); }
void dequantise_row(const DequantiseArgs& args) { HWY_DYNAMIC_DISPATCH(dequantise_row)(args); }

}  // namespace tokenyard::cpu
#endif  // HWY_ONCE
