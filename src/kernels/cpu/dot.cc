// The inner product in the order that kernels.h defines: 16 lanes on every instruction set.

#include <algorithm>
#include <utility>

#include "core/visit_dtype.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/dot.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/cpu/simd_inl.h"

HWY_BEFORE_NAMESPACE();
namespace tokenyard::cpu::HWY_NAMESPACE {

constexpr std::int64_t kDotLanes = 16;

// A step of several vectors, whose sums stay in registers.
template <Dtype kDtype, class D, std::size_t... kIndices>
HWY_INLINE void dot_step(D d, hn::Vec<D>* sums, const Element<kDtype>* a, const Element<kDtype>* b, std::index_sequence<kIndices...>) {
  constexpr std::size_t kLanes = hn::MaxLanes(D());
  ((sums[kIndices] = fused_multiply_add(d, load<kDtype>(d, a + kIndices * kLanes), load<kDtype>(d, b + kIndices * kLanes), sums[kIndices])),
   ...);
}

// The last elements, fewer than kDotLanes, one to a lane.
template <Dtype kDtype, class D>
HWY_INLINE void load_rest(D d, const Element<kDtype>* from, std::int64_t count, hn::TFromD<D>* lanes) {
  HWY_ALIGN Element<kDtype> padded[kDotLanes] = {};
  std::memcpy(padded, from, static_cast<std::size_t>(count) * sizeof(padded[0]));
  for (std::int64_t l = 0; l < kDotLanes; l += hn::MaxLanes(D())) hn::Store(load<kDtype>(d, padded + l), d, lanes + l);
}

template <Dtype kDtype>
float dot_row(const void* a_row, const void* b_row, std::int64_t elements) {
  using Sum = Accumulator<kDtype>;
  const hn::CappedTag<Sum, kDotLanes> d;
  constexpr std::size_t kLanes = hn::MaxLanes(decltype(d)());
  constexpr std::size_t kVectors = kDotLanes / kLanes, kUnrolled = std::min<std::size_t>(kVectors, 4);
  const auto* a = static_cast<const Element<kDtype>*>(a_row);
  const auto* b = static_cast<const Element<kDtype>*>(b_row);

  hn::Vec<decltype(d)> sums[kVectors];
  for (auto& sum : sums) sum = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + kDotLanes <= elements; i += kDotLanes) {
    for (std::size_t v = 0; v < kVectors; v += kUnrolled) {
      const std::int64_t at = i + v * kLanes;
      dot_step<kDtype>(d, sums + v, a + at, b + at, std::make_index_sequence<kUnrolled>());
    }
  }
  HWY_ALIGN Sum lanes[kDotLanes];
  for (std::size_t v = 0; v < kVectors; ++v) hn::Store(sums[v], d, lanes + v * kLanes);

  if (i < elements) {  // lane by lane: in the others, a padding product of +0 would turn -0 into +0
    HWY_ALIGN Sum x[kDotLanes], y[kDotLanes];
    load_rest<kDtype>(d, a + i, elements - i, x);
    load_rest<kDtype>(d, b + i, elements - i, y);
    for (std::int64_t l = 0; l < elements - i; ++l) lanes[l] = std::fma(x[l], y[l], lanes[l]);
  }
  for (std::int64_t width = kDotLanes / 2; width > 0; width /= 2) {
    for (std::int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return static_cast<float>(lanes[0]);
}

float dot(const void* a, const void* b, Dtype dtype, std::int64_t elements) {
  return visit_summable(dtype, [&](auto type) { return dot_row<type.value>(a, b, elements); });
}

}  // namespace tokenyard::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tokenyard::cpu {

HWY_EXPORT(dot);

float dot(const void* a, const void* b, Dtype dtype, std::int64_t elements) { return HWY_DYNAMIC_DISPATCH(dot)(a, b, dtype, elements); }

}  // namespace tokenyard::cpu
#endif  // HWY_ONCE
