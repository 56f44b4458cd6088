#include "reference/naive_numbers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace tokenyard::naive {
namespace {

// A binary format: digits of the significand, exponent of the smallest subnormal, largest finite value.
struct Format {
  int digits;
  int smallest_exponent;
  double largest;
};

Format format_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return {24, -149, std::ldexp(16777215.0, 104)};
    case Dtype::bfloat16:
      return {8, -133, std::ldexp(255.0, 120)};
    case Dtype::float16:
      return {11, -24, 65504.0};
    case Dtype::float8_e4m3:
      return {4, -9, 448.0};
    default:
      throw std::logic_error("not a rounded format");
  }
}

// The bits of a value that the format has: sign, biased exponent, fraction.
std::uint32_t encode(Dtype dtype, double value, int exponent_bits) {
  const Format format = format_of(dtype);
  const int fraction_bits = format.digits - 1;
  const std::uint32_t sign = std::signbit(value) ? 1U << (exponent_bits + fraction_bits) : 0U;
  const std::uint32_t top_exponent = (1U << exponent_bits) - 1;
  const double magnitude = std::fabs(value);
  if (dtype == Dtype::float8_e4m3 && !std::isfinite(value)) return sign | 0x7fU;
  if (std::isnan(value)) return sign | top_exponent << fraction_bits | 1U << (fraction_bits - 1);
  if (std::isinf(value)) return sign | top_exponent << fraction_bits;
  const double units = std::ldexp(magnitude, -format.smallest_exponent);  // of the smallest subnormal: an integer
  const double one = std::ldexp(1.0, fraction_bits);
  if (units < one) return sign | static_cast<std::uint32_t>(units);
  int exponent = 0;
  const double significand = std::ldexp(std::frexp(units, &exponent), format.digits);  // in [one, 2 * one)
  const auto biased = static_cast<std::uint32_t>(exponent - fraction_bits);
  return sign | biased << fraction_bits | static_cast<std::uint32_t>(significand - one);
}

double decode(Dtype dtype, std::uint32_t bits, int exponent_bits) {
  const Format format = format_of(dtype);
  const int fraction_bits = format.digits - 1;
  const double sign = bits >> (exponent_bits + fraction_bits) & 1U ? -1.0 : 1.0;
  const std::uint32_t top_exponent = (1U << exponent_bits) - 1;
  const std::uint32_t exponent = bits >> fraction_bits & top_exponent;
  const std::uint32_t fraction = bits & ((1U << fraction_bits) - 1);
  if (exponent == top_exponent) return fraction == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(fraction, format.smallest_exponent);
  return sign * std::ldexp(fraction + std::ldexp(1.0, fraction_bits), format.smallest_exponent + static_cast<int>(exponent) - 1);
}

// Every value of a 16-bit format: decoding one by one would be most of what the tests do.
std::vector<double> decode_all(Dtype dtype, int exponent_bits) {
  std::vector<double> values;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) values.push_back(decode(dtype, bits, exponent_bits));
  return values;
}

template <class T>
T load(const std::uint8_t* elements, std::int64_t index) {
  T value;
  std::memcpy(&value, elements + index * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

template <class T>
void store(std::uint8_t* elements, std::int64_t index, T value) {
  std::memcpy(elements + index * static_cast<std::int64_t>(sizeof(T)), &value, sizeof(T));
}

template <class Real>
float dot_in(const std::uint8_t* a, const std::uint8_t* b, Dtype dtype, std::int64_t elements) {
  Real lanes[16] = {};
  for (std::int64_t i = 0; i < elements; ++i) {
    lanes[i % 16] = std::fma(static_cast<Real>(read(dtype, a, i)), static_cast<Real>(read(dtype, b, i)), lanes[i % 16]);
  }
  for (int half = 8; half >= 1; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return static_cast<float>(lanes[0]);
}

}  // namespace

int bytes_of(Dtype dtype) {
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
    default:
      return 1;
  }
}

double round_to(Dtype dtype, double value) {
  if (dtype == Dtype::float64 || value == 0.0 || !std::isfinite(value)) return value;
  const Format format = format_of(dtype);
  int exponent = 0;
  std::frexp(value, &exponent);
  const int last_digit = std::max(exponent - format.digits, format.smallest_exponent);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -last_digit)), last_digit);
  if (std::fabs(rounded) <= format.largest) return rounded;
  return std::copysign(dtype == Dtype::float8_e4m3 ? format.largest : INFINITY, value);
}

double read(Dtype dtype, const std::uint8_t* elements, std::int64_t index) {
  static const std::vector<double> kBfloat16 = decode_all(Dtype::bfloat16, 8);
  static const std::vector<double> kFloat16 = decode_all(Dtype::float16, 5);
  switch (dtype) {
    case Dtype::float64:
      return load<double>(elements, index);
    case Dtype::float32:
      return load<float>(elements, index);
    case Dtype::bfloat16:
      return kBfloat16[load<std::uint16_t>(elements, index)];
    case Dtype::float16:
      return kFloat16[load<std::uint16_t>(elements, index)];
    default:
      throw std::logic_error("not a summable type");
  }
}

void write(Dtype dtype, std::uint8_t* elements, std::int64_t index, double value) {
  if (dtype == Dtype::float64) return store(elements, index, value);
  if (dtype == Dtype::float32) return store(elements, index, static_cast<float>(value));
  const double rounded = round_to(dtype, value);
  switch (dtype) {
    case Dtype::bfloat16:
      return store(elements, index, static_cast<std::uint16_t>(encode(dtype, rounded, 8)));
    case Dtype::float16:
      return store(elements, index, static_cast<std::uint16_t>(encode(dtype, rounded, 5)));
    case Dtype::float8_e4m3:
      return store(elements, index, static_cast<std::uint8_t>(encode(dtype, rounded, 4)));
    default:
      throw std::logic_error("not a floating type");
  }
}

Quantised quantise_row(const std::uint8_t* x, Dtype dtype, std::int64_t elements, ScaleFormat format) {
  const std::int64_t blocks = (elements + 127) / 128;
  Quantised row{Bytes(elements), Bytes(format == ScaleFormat::ue8m0 ? (blocks + 3) / 4 * 4 : blocks * 4)};
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t end = std::min(elements, (block + 1) * 128);
    float largest = 1e-4F;
    for (std::int64_t i = block * 128; i < end; ++i) largest = std::max(largest, static_cast<float>(std::fabs(read(dtype, x, i))));
    const float exact_scale = largest / 448.0F;
    int exponent = 0;  // the smallest with 2^exponent >= exact_scale
    if (std::frexp(exact_scale, &exponent) == 0.5F) --exponent;
    const float power = std::ldexp(1.0F, exponent);
    for (std::int64_t i = block * 128; i < end; ++i) {
      const auto value = static_cast<float>(read(dtype, x, i));
      write(Dtype::float8_e4m3, row.q.data(), i, format == ScaleFormat::float32 ? value * (448.0F / largest) : value / power);
    }
    if (format == ScaleFormat::ue8m0) row.scales[block] = static_cast<std::uint8_t>(exponent + 127);
    if (format != ScaleFormat::ue8m0) store(row.scales.data(), block, format == ScaleFormat::float32 ? exact_scale : power);
  }
  return row;
}

float dot(const std::uint8_t* a, const std::uint8_t* b, Dtype dtype, std::int64_t elements) {
  return dtype == Dtype::float64 ? dot_in<double>(a, b, dtype, elements) : dot_in<float>(a, b, dtype, elements);
}

}  // namespace tokenyard::naive
