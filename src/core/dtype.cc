#include "tokenyard/dtype.h"

#include <bit>

#include "core/name_table.h"

namespace tokenyard {
namespace {

constexpr NamedValue<Dtype> kDtypes[] = {
    {Dtype::float64, "float64"},
    {Dtype::float32, "float32"},
    {Dtype::bfloat16, "bfloat16"},
    {Dtype::float16, "float16"},
    {Dtype::float8_e4m3, "float8_e4m3"},
    {Dtype::ue8m0, "ue8m0"},
    {Dtype::int64, "int64"},
    {Dtype::int32, "int32"},
    {Dtype::uint8, "uint8"},
    {Dtype::float64, "f64"},
    {Dtype::float32, "f32"},
    {Dtype::bfloat16, "bf16"},
    {Dtype::float16, "fp16"},
    {Dtype::float8_e4m3, "fp8"},
    {Dtype::int64, "i64"},
    {Dtype::int32, "i32"},
    {Dtype::uint8, "u8"},
};

constexpr std::uint32_t kFloatSign = 0x80000000;
constexpr std::uint32_t kFloatInf = 0x7f800000;
constexpr std::uint32_t kFloatQuietNan = 0x7fc00000;
constexpr int kFloatMantissaBits = 23;
constexpr int kFloatBias = 127;

// Small binary formats: sign, exponent with bias kBias, kMantissaBits, subnormals.
template <int kMantissaBits, int kBias>
struct SmallFloat {
  static constexpr int kDropped = kFloatMantissaBits - kMantissaBits;
  static constexpr std::uint32_t kRebias = static_cast<std::uint32_t>(kFloatBias - kBias) << kFloatMantissaBits;

  // The magnitude of a float32 that is finite and not too large for the exponent; rounding may carry into it.
  static constexpr std::uint32_t from_magnitude(std::uint32_t bits) {
    constexpr std::uint32_t kMinNormal = kRebias + (1u << kFloatMantissaBits);
    if (bits >= kMinNormal) {
      const std::uint32_t odd = (bits >> kDropped) & 1;
      return (bits - kRebias + (1u << (kDropped - 1)) - 1 + odd) >> kDropped;
    }
    // Next to kAligner float32 has the spacing of the subnormals: the addition rounds, nearest even.
    constexpr std::uint32_t kAlignerBits = kRebias + (static_cast<std::uint32_t>(kDropped + 1) << kFloatMantissaBits);
    constexpr auto kAligner = std::bit_cast<float>(kAlignerBits);
    return std::bit_cast<std::uint32_t>(std::bit_cast<float>(bits) + kAligner) - kAlignerBits;
  }

  // Exact, for any magnitude that is a number.
  static constexpr float to_float(std::uint32_t sign, std::uint32_t magnitude) {
    constexpr std::uint32_t kMinNormal = 1u << kMantissaBits;
    if (magnitude >= kMinNormal) return std::bit_cast<float>(sign | ((magnitude << kDropped) + kRebias));
    constexpr float kUnit = std::bit_cast<float>(static_cast<std::uint32_t>(kFloatBias + 1 - kBias - kMantissaBits) << kFloatMantissaBits);
    const float value = static_cast<float>(magnitude) * kUnit;
    return sign ? -value : value;
  }
};

using Float16 = SmallFloat<10, 15>;
using Float8E4m3 = SmallFloat<3, 7>;

}  // namespace

int size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
    case Dtype::int64:
      return 8;
    case Dtype::float32:
    case Dtype::int32:
      return 4;
    case Dtype::bfloat16:
    case Dtype::float16:
      return 2;
    case Dtype::float8_e4m3:
    case Dtype::ue8m0:
    case Dtype::uint8:
      return 1;
  }
  TY_ASSERT(!"a known dtype");
}

std::string_view name(Dtype dtype) { return name_in(kDtypes, dtype); }
Dtype parse_dtype(std::string_view text) { return parse_in(kDtypes, "dtype", text); }

bool is_summable(Dtype dtype) {
  return dtype == Dtype::float64 || dtype == Dtype::float32 || dtype == Dtype::bfloat16 || dtype == Dtype::float16;
}

float bfloat16_to_float(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

std::uint16_t float_to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & ~kFloatSign) > kFloatInf) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float float16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = std::uint32_t{bits & 0x8000u} << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  if (magnitude == 0x7c00) return std::bit_cast<float>(sign | kFloatInf);
  if (magnitude > 0x7c00) return std::bit_cast<float>(sign | kFloatQuietNan);
  return Float16::to_float(sign, magnitude);
}

std::uint16_t float_to_float16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits & kFloatSign) >> 16;
  const std::uint32_t magnitude = bits & ~kFloatSign;
  constexpr std::uint32_t kOverflow = 0x477ff000;  // 65520, half way between the largest number and the next power of two
  if (magnitude > kFloatInf) return 0x7fff;
  if (magnitude >= kOverflow) return static_cast<std::uint16_t>(sign | 0x7c00);
  return static_cast<std::uint16_t>(sign | Float16::from_magnitude(magnitude));
}

float float8_e4m3_to_float(std::uint8_t bits) {
  const std::uint32_t sign = std::uint32_t{bits & 0x80u} << 24;
  const std::uint32_t magnitude = bits & 0x7fu;
  if (magnitude == 0x7f) return std::bit_cast<float>(sign | kFloatQuietNan);
  return Float8E4m3::to_float(sign, magnitude);
}

std::uint8_t float_to_float8_e4m3(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits & kFloatSign) >> 24;
  const std::uint32_t magnitude = bits & ~kFloatSign;
  constexpr std::uint32_t kMax = 0x43e00000;  // 448
  if (magnitude >= kFloatInf) return 0x7f;
  if (magnitude >= kMax) return static_cast<std::uint8_t>(sign | 0x7e);
  return static_cast<std::uint8_t>(sign | Float8E4m3::from_magnitude(magnitude));
}

float ue8m0_to_float(std::uint8_t bits) {
  if (bits == 0xff) return std::bit_cast<float>(kFloatQuietNan);
  if (bits == 0) return std::bit_cast<float>(0x00400000u);  // 2^-127 is a subnormal float32
  return std::bit_cast<float>(std::uint32_t{bits} << kFloatMantissaBits);
}

std::uint8_t float_to_ue8m0_ceil(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (bits == 0 || bits >= kFloatInf) return 0xff;  // zero, negative, infinite, NaN
  if (bits <= 0x00400000) return 0;                 // at most 2^-127
  return static_cast<std::uint8_t>((bits + 0x007fffff) >> kFloatMantissaBits);
}

}  // namespace tokenyard
