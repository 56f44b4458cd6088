#pragma once
// Row movers of the CPU: SIMD with run-time dispatch (Highway). Every function is pure over its arguments and gives the
// same bits on every instruction set: true fused multiply-add everywhere, no flush to zero, and a NaN result is always
// the positive NaN with all mantissa bits set. Pointers may have any alignment.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenyard/dtype.h"
#include "tokenyard/quantise.h"

namespace tokenyard::cpu {

// Any length and alignment. Uses non-temporal stores when `stream`: the caller runs stream_fence() before it publishes.
void copy_row(void* to, const void* from, std::size_t bytes, bool stream);
// One read of `from`, `count` writes.
void copy_row_to_many(void* const* to, int count, const void* from, std::size_t bytes, bool stream);
void stream_fence();
// Rows of a large batch leave the caches before their reader comes: writing around the caches saves reading what is
// overwritten. A small batch is read at once, so it had better stay.
constexpr bool should_stream(std::int64_t bytes) { return bytes >= (std::int64_t{4} << 20); }

// A row sum acc = fma(w, x, acc), or acc + x without weights, terms in order, start +0. float32 accumulators for
// float32, bfloat16 and float16 terms, float64 for float64; rounded once to `dtype`.
struct FoldArgs {
  const void* const* rows = nullptr;  // [count], each `elements` of `dtype`
  const float* weights = nullptr;     // [count] or null
  int count = 0;                      // 0 gives +0
  Dtype dtype = Dtype::float32;
  std::int64_t elements = 0;
  void* out = nullptr;  // may be one of rows
  bool stream = false;  // as for copy_row
};
void fold(const FoldArgs& args);

// The final sum: bias0 + bias1 (absent: +0), then partials in order, rounded once to out_dtype. With groups, each run of
// partials [group_ends[g-1], group_ends[g]) is summed from +0 and rounded to `dtype` before it is added.
struct ReduceArgs {
  const void* const* partials = nullptr;  // [count], of `dtype`
  int count = 0;
  const int* group_ends = nullptr;  // null: flat
  int num_groups = 0;
  const void* bias0 = nullptr;  // of `dtype`
  const void* bias1 = nullptr;
  Dtype dtype = Dtype::float32;
  Dtype out_dtype = Dtype::float32;
  std::int64_t elements = 0;
  void* out = nullptr;
  bool stream = false;
};
void reduce(const ReduceArgs& args);

// out = round(w * x), one rounding to float32 (float64: to float64), then one to dtype. out may be x.
void scale_row(void* out, const void* x, float weight, Dtype dtype, std::int64_t elements);

// sum of a[i] * b[i] in a fixed order: 16 float32 lanes, lane i % 16 takes acc = fma(a[i], b[i], acc), i ascending from +0;
// then lanes are added pairwise: (l, l+8), (l, l+4), (l, l+2), (l, l+1). float64: the same in float64, rounded to float32.
float dot(const void* a, const void* b, Dtype dtype, std::int64_t elements);

// One row of `elements`; scales is [ceil(elements / 128)] of float32, or of bytes packed four to a word (ue8m0), with
// `scale_stride` bytes from one float32 or word to the next. Arithmetic as in tokenyard/quantise.h.
struct QuantiseArgs {
  const void* x = nullptr;
  Dtype dtype = Dtype::float32;  // bfloat16, float16, float32
  std::int64_t elements = 0;
  ScaleFormat format = ScaleFormat::float32;
  std::uint8_t* q = nullptr;
  std::byte* scales = nullptr;
  std::int64_t scale_stride = 4;
};
void quantise_row(const QuantiseArgs& args);
struct DequantiseArgs {
  const std::uint8_t* q = nullptr;
  const std::byte* scales = nullptr;
  std::int64_t scale_stride = 4;
  ScaleFormat format = ScaleFormat::float32;
  std::int64_t elements = 0;
  void* x = nullptr;
  Dtype dtype = Dtype::float32;
};
void dequantise_row(const DequantiseArgs& args);

// The instruction set in use, e.g. "AVX2".
const char* target_name();
// What this machine can run, best first; tests go through all. An unknown name ("") goes back to the best.
std::vector<std::string> supported_targets();
void use_target(std::string_view name);

}  // namespace tokenyard::cpu
