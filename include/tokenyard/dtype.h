#pragma once
// Element types and their exact conversions to and from float32.
//
// Every conversion is defined for every bit pattern: round to nearest even, subnormals are kept, NaN stays NaN. Payloads
// are not kept: a float becomes the NaN with all bits set but the sign, as on GPUs. Sources: IEEE 754-2019 (binary16),
// the bfloat16 definition of the same rounding, "FP8 Formats for Deep Learning" (arXiv 2209.05433) for e4m3, and
// "OCP Microscaling Formats 1.0" for UE8M0.

#include <cstdint>
#include <string_view>

namespace tokenyard {

enum class Dtype : std::uint8_t { float64, float32, bfloat16, float16, float8_e4m3, ue8m0, int64, int32, uint8 };

// Bytes of one element.
int size_of(Dtype dtype);
// "float32", "bfloat16", ...; the spelling that parse_dtype accepts.
std::string_view name(Dtype dtype);
// Accepts the names above and the short forms f64, f32, bf16, fp16, fp8, i64, i32, u8. UsageError for anything else.
Dtype parse_dtype(std::string_view text);
// float64, float32, bfloat16, float16: what combine can add.
bool is_summable(Dtype dtype);

float bfloat16_to_float(std::uint16_t bits);
std::uint16_t float_to_bfloat16(float value);
float float16_to_float(std::uint16_t bits);
std::uint16_t float_to_float16(float value);
// e4m3 has no infinity; 0x7f and 0xff are NaN. float_to_float8_e4m3 saturates finite values at +-448; infinities become NaN.
float float8_e4m3_to_float(std::uint8_t bits);
std::uint8_t float_to_float8_e4m3(float value);
// A UE8M0 scale is a bare biased exponent: 2^(bits - 127); 0xff is NaN.
float ue8m0_to_float(std::uint8_t bits);
// The smallest power of two >= value, as its biased exponent; 0xff (NaN) unless 0 < value <= 2^127.
std::uint8_t float_to_ue8m0_ceil(float value);

}  // namespace tokenyard
