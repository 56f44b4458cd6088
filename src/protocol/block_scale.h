#pragma once
// One block of tokenyard/quantise.h in float32 arithmetic that is the same on host and device: no fused or flushed operation.

#include <bit>
#include <cstdint>

#include "protocol/host_device.h"
#include "tokenyard/quantise.h"

namespace tokenyard::protocol {

constexpr std::uint32_t kFloatInfinity = 0x7f800000;
constexpr std::uint32_t kFloatMagnitude = 0x7fffffff;

// What an element adds to its block's largest magnitude, as bits: those of non-negative floats compare as integers.
constexpr TY_HOST_DEVICE std::uint32_t amax_bits(float x) {
  const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(x) & kFloatMagnitude;
  return magnitude < kFloatInfinity ? magnitude : 0;
}

struct BlockScale {
  std::uint32_t stored = 0;  // the bits of the float32 scale; ue8m0: the biased exponent
  float factor = 1.0F;       // brings the block's elements to the range of e4m3
};

// `largest`: the maximum of amax_bits over the block.
constexpr TY_HOST_DEVICE BlockScale block_scale(std::uint32_t largest, ScaleFormat format) {
  constexpr std::uint32_t kSmallest = std::bit_cast<std::uint32_t>(1e-4F);
  constexpr float kLargestE4m3 = 448.0F;
  const auto amax = std::bit_cast<float>(largest > kSmallest ? largest : kSmallest);
  const float scale = amax / kLargestE4m3;
  if (format == ScaleFormat::float32) return {std::bit_cast<std::uint32_t>(scale), kLargestE4m3 / amax};
  // Rounded up to a power of two; within 2^-22 .. 2^120, so the factor is exact.
  constexpr int kMantissaBits = 23;
  const std::uint32_t exponent = (std::bit_cast<std::uint32_t>(scale) + 0x007fffff) >> kMantissaBits;
  const std::uint32_t rounded = exponent << kMantissaBits;
  return {format == ScaleFormat::ue8m0 ? exponent : rounded, 1.0F / std::bit_cast<float>(rounded)};
}

// Nearest even, saturating; infinities and NaN become NaN (0x7f).
constexpr TY_HOST_DEVICE std::uint32_t e4m3_bits(float value) {
  constexpr std::uint32_t kLargest = 0x43e00000;  // 448
  constexpr int kDropped = 20;                    // mantissa bits that e4m3 does not have
  constexpr std::uint32_t kRebias = std::uint32_t{127 - 7} << 23;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 24 & 0x80;
  std::uint32_t magnitude = bits & kFloatMagnitude;
  if (magnitude >= kFloatInfinity) return 0x7f;
  if (magnitude > kLargest) magnitude = kLargest;
  if (magnitude >= kRebias + (1U << 23)) {
    return (magnitude - kRebias + (1U << (kDropped - 1)) - 1 + (magnitude >> kDropped & 1)) >> kDropped | sign;
  }
  // Next to the aligner float32 has the spacing of e4m3's subnormals: the addition rounds.
  constexpr std::uint32_t kAligner = kRebias + (std::uint32_t{kDropped + 1} << 23);
  const float aligned = std::bit_cast<float>(magnitude) + std::bit_cast<float>(kAligner);
  return (std::bit_cast<std::uint32_t>(aligned) - kAligner) | sign;
}

}  // namespace tokenyard::protocol
