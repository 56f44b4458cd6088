#pragma once
// Element types in the plainest words: every value is a double, rounding is one formula. Shares no code with the library.

#include <cstdint>
#include <vector>

#include "tokenyard/options.h"  // only for its enumerations

namespace tokenyard::naive {

using Bytes = std::vector<std::uint8_t>;

int bytes_of(Dtype dtype);
// The nearest value of `dtype`, ties to even; e4m3 saturates, the others overflow to infinity.
double round_to(Dtype dtype, double value);
// Element `index` of packed elements; exact.
double read(Dtype dtype, const std::uint8_t* elements, std::int64_t index);
// Rounds and writes. A value that `dtype` has is kept bit for bit, except for the payload of a NaN.
void write(Dtype dtype, std::uint8_t* elements, std::int64_t index, double value);

struct Quantised {
  Bytes q;
  Bytes scales;
};
// One row: blocks of 128 elements, a = max(max|x|, 1e-4), q = e4m3(x * (448 / a)), scale = a / 448; float32 throughout.
Quantised quantise_row(const std::uint8_t* x, Dtype dtype, std::int64_t elements, ScaleFormat format);

// sum a[i] * b[i]: lane i % 16 takes fma(a[i], b[i], lane), then lanes fold in halves. In float32 (float64: in float64),
// and rounded to float32.
float dot(const std::uint8_t* a, const std::uint8_t* b, Dtype dtype, std::int64_t elements);

}  // namespace tokenyard::naive
