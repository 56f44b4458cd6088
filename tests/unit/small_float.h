#pragma once
// The narrow formats by their definition: a table of all values, and rounding by search in it. Slow and plain.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace tokenyard::testing {

class SmallFloat {
 public:
  static const SmallFloat& bfloat16() {
    static const SmallFloat format(8, 7, true);
    return format;
  }
  static const SmallFloat& float16() {
    static const SmallFloat format(5, 10, true);
    return format;
  }
  static const SmallFloat& float8_e4m3() {
    static const SmallFloat format(4, 3, false);
    return format;
  }

  int bits() const { return 1 + exponent_bits_ + mantissa_bits_; }
  std::uint32_t sign_bit() const { return 1u << (bits() - 1); }
  // The non-negative numbers, ascending: the index is the bit pattern.
  const std::vector<double>& numbers() const { return numbers_; }
  std::uint32_t nan() const { return sign_bit() - 1; }
  bool is_infinity(std::uint32_t pattern) const { return has_infinity_ && (pattern & ~sign_bit()) == numbers_.size(); }
  bool is_nan(std::uint32_t pattern) const { return (pattern & ~sign_bit()) >= numbers_.size() && !is_infinity(pattern); }

  double decode(std::uint32_t pattern) const {
    if (is_nan(pattern)) return NAN;
    const double magnitude = is_infinity(pattern) ? INFINITY : numbers_[pattern & ~sign_bit()];
    return pattern & sign_bit() ? -magnitude : magnitude;
  }

  // Nearest, ties to the even pattern. Without infinity, finite values saturate and infinity becomes NaN.
  std::uint32_t encode(double value) const {
    const double magnitude = std::fabs(value);
    if (std::isnan(value) || (std::isinf(value) && !has_infinity_)) return nan();
    return nearest(magnitude) | (std::signbit(value) ? sign_bit() : 0);
  }

 private:
  SmallFloat(int exponent_bits, int mantissa_bits, bool has_infinity)
      : exponent_bits_(exponent_bits), mantissa_bits_(mantissa_bits), has_infinity_(has_infinity) {
    // IEEE keeps the last exponent for infinity and NaN, e4m3 only its last pattern.
    const std::uint32_t specials = has_infinity ? 1u << mantissa_bits : 1;
    for (std::uint32_t pattern = 0; pattern < sign_bit() - specials; ++pattern) numbers_.push_back(value_of(pattern));
    beyond_ = value_of(static_cast<std::uint32_t>(numbers_.size()));
  }

  double value_of(std::uint32_t pattern) const {
    const int bias = (1 << (exponent_bits_ - 1)) - 1;
    const int exponent = static_cast<int>(pattern >> mantissa_bits_);
    const int mantissa = static_cast<int>(pattern & ((1u << mantissa_bits_) - 1));
    if (exponent == 0) return std::ldexp(mantissa, 1 - bias - mantissa_bits_);
    return std::ldexp(mantissa + (1 << mantissa_bits_), exponent - bias - mantissa_bits_);
  }

  std::uint32_t nearest(double magnitude) const {
    const auto above = std::upper_bound(numbers_.begin(), numbers_.end(), magnitude);
    const auto low = static_cast<std::uint32_t>(above - numbers_.begin()) - 1;
    const bool is_last = above == numbers_.end();
    if (is_last && !has_infinity_) return low;
    const double midpoint = (numbers_[low] + (is_last ? beyond_ : *above)) / 2;  // exact
    if (magnitude == midpoint) return low + (low & 1);
    return magnitude < midpoint ? low : low + 1;
  }

  int exponent_bits_;
  int mantissa_bits_;
  bool has_infinity_;
  std::vector<double> numbers_;
  double beyond_;  // what would follow the largest number
};

}  // namespace tokenyard::testing
