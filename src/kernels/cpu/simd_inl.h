// Vectors of accumulators from and to memory of any element type, compiled once per instruction set.
//
// A NaN that is stored becomes the positive NaN with all mantissa bits set, whatever its origin: instruction sets differ
// in the NaN that arithmetic makes and in the operand whose NaN they keep.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/cpu/targets.h"

#include <hwy/highway.h>

#include "tokenyard/dtype.h"

// Highway's toggle instead of #pragma once: included again for every target.
#if defined(TY_KERNELS_CPU_SIMD_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef TY_KERNELS_CPU_SIMD_INL
#undef TY_KERNELS_CPU_SIMD_INL
#else
#define TY_KERNELS_CPU_SIMD_INL
#endif

HWY_BEFORE_NAMESPACE();
namespace tokenyard::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// What lies in memory, and what it is added up in.
template <Dtype kDtype>
using Element = std::conditional_t<kDtype == Dtype::float64, double, std::conditional_t<kDtype == Dtype::float32, float, std::uint16_t>>;
template <Dtype kDtype>
using Accumulator = std::conditional_t<kDtype == Dtype::float64, double, float>;

template <class D>
HWY_INLINE hn::Vec<D> fused_multiply_add(D d, hn::Vec<D> a, hn::Vec<D> b, hn::Vec<D> c) {
  if constexpr (HWY_NATIVE_FMA) {
    return hn::MulAdd(a, b, c);
  } else if constexpr (hn::MaxLanes(D()) == 1) {  // from here on, Highway would round twice
    return hn::Set(d, std::fma(hn::GetLane(a), hn::GetLane(b), hn::GetLane(c)));
  } else {
    HWY_ALIGN hn::TFromD<D> x[hn::MaxLanes(d)], y[hn::MaxLanes(d)], z[hn::MaxLanes(d)];
    hn::Store(a, d, x);
    hn::Store(b, d, y);
    hn::Store(c, d, z);
    for (std::size_t i = 0; i < hn::Lanes(d); ++i) z[i] = std::fma(x[i], y[i], z[i]);
    return hn::Load(d, z);
  }
}

// The binary formats below float32 in int32 lanes; src/core/dtype.cc explains the steps.
template <int kMantissaBits, int kBias>
struct SmallFloat {
  static constexpr int kDropped = 23 - kMantissaBits;
  static constexpr std::int32_t kRebias = (127 - kBias) << 23;

  template <class DI>
  static HWY_INLINE hn::Vec<DI> from_magnitude(DI di, hn::Vec<DI> bits) {
    const hn::RebindToFloat<DI> df;
    const auto odd = hn::And(hn::ShiftRight<kDropped>(bits), hn::Set(di, 1));
    const auto half = hn::Set(di, (1 << (kDropped - 1)) - 1 - kRebias);
    const auto normal = hn::ShiftRight<kDropped>(hn::Add(hn::Add(bits, half), odd));
    const auto aligner = hn::Set(di, kRebias + ((kDropped + 1) << 23));
    const auto aligned = hn::Add(hn::BitCast(df, bits), hn::BitCast(df, aligner));
    const auto subnormal = hn::Sub(hn::BitCast(di, aligned), aligner);
    return hn::IfThenElse(hn::Lt(bits, hn::Set(di, kRebias + (1 << 23))), subnormal, normal);
  }

  // The float32 bits of a magnitude that is a number.
  template <class DI>
  static HWY_INLINE hn::Vec<DI> to_float_bits(DI di, hn::Vec<DI> magnitude) {
    const hn::RebindToFloat<DI> df;
    const auto unit = hn::BitCast(df, hn::Set(di, (128 - kBias - kMantissaBits) << 23));
    const auto subnormal = hn::BitCast(di, hn::Mul(hn::ConvertTo(df, magnitude), unit));
    const auto normal = hn::Add(hn::ShiftLeft<kDropped>(magnitude), hn::Set(di, kRebias));
    return hn::IfThenElse(hn::Lt(magnitude, hn::Set(di, 1 << kMantissaBits)), subnormal, normal);
  }
};

using Float16 = SmallFloat<10, 15>;
using Float8E4m3 = SmallFloat<3, 7>;

template <class D>
HWY_INLINE hn::Vec<D> float16_to_float(D d, hn::Vec<hn::Rebind<std::uint16_t, D>> raw) {
  if constexpr (HWY_NATIVE_FMA) {  // every instruction set with fma converts binary16 too
    return hn::PromoteTo(d, hn::BitCast(hn::Rebind<hwy::float16_t, D>(), raw));
  } else {
    const hn::RebindToSigned<D> di;
    const auto bits = hn::PromoteTo(di, raw);
    const auto magnitude = hn::And(bits, hn::Set(di, 0x7fff));
    const auto sign = hn::ShiftLeft<16>(hn::AndNot(magnitude, bits));
    const auto number = Float16::to_float_bits(di, magnitude);
    // Infinity and NaN: the exponent grows from 31 + 112 to 255.
    const auto special = hn::Add(number, hn::Set(di, Float16::kRebias));
    const auto result = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x7bff)), special, number);
    return hn::BitCast(d, hn::Or(result, sign));
  }
}

template <class D>
HWY_INLINE hn::Vec<hn::Rebind<std::uint16_t, D>> float_to_float16(D, hn::Vec<D> value) {
  const hn::Rebind<std::uint16_t, D> d16;
  if constexpr (HWY_NATIVE_FMA) {
    const hn::RebindToSigned<decltype(d16)> di16;
    const auto half = hn::BitCast(d16, hn::DemoteTo(hn::Rebind<hwy::float16_t, D>(), value));
    // 0x7c00 is infinity; larger magnitudes are NaN.
    const auto magnitude = hn::BitCast(di16, hn::And(half, hn::Set(d16, 0x7fff)));
    const auto is_nan = hn::RebindMask(d16, hn::Gt(magnitude, hn::Set(di16, 0x7c00)));
    return hn::IfThenElse(is_nan, hn::Set(d16, 0x7fff), half);
  } else {
    const hn::RebindToSigned<D> di;
    const auto bits = hn::BitCast(di, value);
    const auto magnitude = hn::And(bits, hn::Set(di, 0x7fffffff));
    const auto sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(di, 0x8000));
    const auto number = Float16::from_magnitude(di, magnitude);
    const auto finite = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x477fefff)), hn::Set(di, 0x7c00), number);
    const auto half = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x7f800000)), hn::Set(di, 0x7fff), hn::Or(finite, sign));
    return hn::DemoteTo(d16, half);
  }
}

// A bfloat16 is the upper half of the result; the lower half is left over from rounding. Not for NaN.
template <class D>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<D>> number_to_upper_half(D, hn::Vec<D> value) {
  const hn::RebindToUnsigned<D> du;
  const auto bits = hn::BitCast(du, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  return hn::Add(hn::Add(bits, hn::Set(du, 0x7fff)), odd);
}

template <class D>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<D>> round_to_upper_half(D d, hn::Vec<D> value) {
  const hn::RebindToUnsigned<D> du;
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(value)), hn::Set(du, 0x7fff0000), number_to_upper_half(d, value));
}

template <class D>
HWY_INLINE hn::Vec<hn::Rebind<std::uint16_t, D>> float_to_bfloat16(D d, hn::Vec<D> value) {
  const auto halves = hn::ShiftRight<16>(round_to_upper_half(d, value));
  return hn::DemoteTo(hn::Rebind<std::uint16_t, D>(), hn::BitCast(hn::RebindToSigned<D>(), halves));
}

template <Dtype kDtype, class D>
HWY_INLINE hn::Vec<D> decode(D d, hn::Vec<hn::Rebind<Element<kDtype>, D>> raw) {
  if constexpr (kDtype == Dtype::bfloat16) {
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(hn::RebindToUnsigned<D>(), raw)));
  } else if constexpr (kDtype == Dtype::float16) {
    return float16_to_float(d, raw);
  } else {
    return raw;
  }
}

template <Dtype kDtype, class D>
HWY_INLINE hn::Vec<hn::Rebind<Element<kDtype>, D>> encode(D d, hn::Vec<D> value) {
  if constexpr (kDtype == Dtype::bfloat16) {
    return float_to_bfloat16(d, value);
  } else if constexpr (kDtype == Dtype::float16) {
    return float_to_float16(d, value);
  } else {
    const hn::RebindToSigned<D> di;
    const auto nan = hn::BitCast(d, hn::Set(di, std::numeric_limits<hn::TFromD<decltype(di)>>::max()));
    return hn::IfThenElse(hn::IsNaN(value), nan, value);
  }
}

template <Dtype kDtype, class D>
HWY_INLINE hn::Vec<D> load(D d, const Element<kDtype>* from) {
  return decode<kDtype>(d, hn::LoadU(hn::Rebind<Element<kDtype>, D>(), from));
}

template <Dtype kDtype, class D>
HWY_INLINE void store(D d, hn::Vec<D> value, Element<kDtype>* to) {
  hn::StoreU(encode<kDtype>(d, value), hn::Rebind<Element<kDtype>, D>(), to);
}

}  // namespace tokenyard::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // TY_KERNELS_CPU_SIMD_INL
