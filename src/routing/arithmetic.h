#pragma once
// The float32 arithmetic and the order of selection that all routing shares. Built from operations that IEEE 754 rounds
// correctly (and never contracted, as everywhere here), so the CPU and a GPU compute the same bits and therefore choose the
// same experts; a libm's expf promises no such thing.

#include <bit>
#include <cstdint>
#include <limits>

#include "protocol/host_device.h"

namespace tokenyard::routing_internal {

constexpr int kMaxTopK = 64;
constexpr float kNever = -std::numeric_limits<float>::infinity();  // the score of what cannot be selected

// e^x for x <= 0, within 1 ulp; 0 for -inf and NaN. Splits x = n ln 2 + r with |r| <= ln 2 / 2 and sums the Taylor series of
// e^r, whose first omitted term, r^8 / 8!, is below 2^-27.
TY_HOST_DEVICE inline float exp_of_negative(float x) {
  if (!(x > -104.0F)) return 0.0F;  // less than half of the least subnormal
  const int n = static_cast<int>(x * 1.44269504F - 0.5F);
  const float n_float = static_cast<float>(n);
  // ln 2 in two parts: the first has nine bits, so its product and the difference are exact.
  const float r = (x - n_float * 0.693359375F) + n_float * 2.12194440e-4F;
  float sum = 1.0F / 5040;
  sum = sum * r + 1.0F / 720;
  sum = sum * r + 1.0F / 120;
  sum = sum * r + 1.0F / 24;
  sum = sum * r + 1.0F / 6;
  sum = sum * r + 0.5F;
  sum = 1.0F + (r + r * r * sum);  // small to large
  // 2^n in two factors, as n reaches -150: only the last product rounds, and only into the subnormals.
  const auto power = [](int exponent) { return std::bit_cast<float>(static_cast<std::uint32_t>(exponent + 127) << 23); };
  return sum * power(n / 2) * power(n - n / 2);
}

TY_HOST_DEVICE inline float sigmoid(float x) {
  const float e = exp_of_negative(x < 0 ? x : -x);
  return (x < 0 ? e : 1.0F) / (1.0F + e);
}

// The order of selection: higher score first, ties to the lower id.
TY_HOST_DEVICE constexpr bool precedes(float score_a, int id_a, float score_b, int id_b) {
  return score_a > score_b || (score_a == score_b && id_a < id_b);
}

// The `capacity` best of what was inserted, in order of selection.
struct TopK {
  int capacity = 0;
  int size = 0;
  float scores[kMaxTopK];
  int ids[kMaxTopK];

  TY_HOST_DEVICE explicit constexpr TopK(int k) : capacity(k) {}
  TY_HOST_DEVICE constexpr void insert(float score, int id) {
    if (score == kNever) return;
    if (size == capacity && !precedes(score, id, scores[size - 1], ids[size - 1])) return;
    int at = size < capacity ? size++ : size - 1;
    for (; at > 0 && precedes(score, id, scores[at - 1], ids[at - 1]); --at) {
      scores[at] = scores[at - 1];
      ids[at] = ids[at - 1];
    }
    scores[at] = score;
    ids[at] = id;
  }
};

}  // namespace tokenyard::routing_internal
