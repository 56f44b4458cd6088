// Counter-based random numbers: element i of a tensor needs none of the others.

#include "core/usage.h"
#include "core/visit_dtype.h"
#include "tokenyard/weights.h"

namespace tokenyard {
namespace {

// The finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators").
std::uint64_t mix(std::uint64_t word) {
  word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9U;
  word = (word ^ (word >> 27)) * 0x94d049bb133111ebU;
  return word ^ (word >> 31);
}

std::uint64_t key_of(std::string_view name, std::uint64_t seed) {
  std::uint64_t key = mix(seed + 0x9e3779b97f4a7c15U);
  for (const char c : name) key = mix(key + 0x9e3779b97f4a7c15U + static_cast<unsigned char>(c));
  return key;
}

// Word `number` of element `index`.
std::uint64_t word(std::uint64_t key, std::int64_t index, int number) {
  return mix(mix(key + static_cast<std::uint64_t>(index) * 0x9e3779b97f4a7c15U) + static_cast<std::uint64_t>(number) * 0xd1b54a32d192ed03U);
}

// In [-1, 1): exact.
double uniform(std::uint64_t key, std::int64_t index) {
  return static_cast<double>(static_cast<std::int64_t>(word(key, index, 0)) >> 11) * 0x1p-52;
}

// Twelve 16-bit numbers, each the middle of its step of [0, 1): their sum less 6 has mean 0 and variance 1 (to 2^-32). Exact.
double normal(std::uint64_t key, std::int64_t index) {
  std::int64_t sum = 0;
  for (int number = 0; number < 3; ++number) {
    for (std::uint64_t bits = word(key, index, number), i = 0; i < 4; ++i, bits >>= 16) sum += static_cast<std::int64_t>(bits & 0xffffU);
  }
  return static_cast<double>(2 * sum + 12 - 786432) * 0x1p-17;
}

// float32 from the one rounding that all dtypes but float64 begin with.
void store(const TensorView& out, std::int64_t index, double value) {
  const auto single = static_cast<float>(value);
  switch (out.dtype) {
    case Dtype::float64:
      out.as<double>()[index] = value;
      return;
    case Dtype::bfloat16:
      out.as<std::uint16_t>()[index] = float_to_bfloat16(single);
      return;
    case Dtype::float16:
      out.as<std::uint16_t>()[index] = float_to_float16(single);
      return;
    default:
      out.as<float>()[index] = single;
  }
}

}  // namespace

void initialise(std::string_view name, const Initialisation& how, const ShardMap& map, const TensorView& out) {
  if (!is_summable(out.dtype) || out.num_elements() != map.local_elements() || !out.rows_contiguous() ||
      (out.ndim > 0 && out.shape[0] > 1 && out.strides[0] * out.shape[0] != out.num_elements())) {
    usage_error("{}: out is {}; expected {} dense elements of float64, float32, bfloat16 or float16", name, describe(out),
                map.local_elements());
  }
  const std::uint64_t key = key_of(name, how.seed);
  const auto draw = how.distribution == Distribution::uniform ? uniform : normal;
  for (const Run& run : map.runs()) {
    for (std::int64_t i = 0; i < run.length; ++i) store(out, run.local_offset + i, draw(key, run.global_offset + i) * how.scale);
  }
}

}  // namespace tokenyard
