// The inner product in the order that kernels.h defines: 16 lanes on every instruction set.

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

// One step of all 16 lanes, as many vectors as that takes.
template <Dtype kDtype, class D, std::size_t... kIndices>
HWY_INLINE void dot_step(D d, hn::Vec<D>* sums, const Element<kDtype>* a, const Element<kDtype>* b, std::index_sequence<kIndices...>) {
  constexpr std::size_t kLanes = hn::MaxLanes(D());
  ((sums[kIndices] = fused_multiply_add(d, load<kDtype>(d, a + kIndices * kLanes), load<kDtype>(d, b + kIndices * kLanes), sums[kIndices])),
   ...);
}

template <Dtype kDtype>
float dot_row(const void* a_row, const void* b_row, std::int64_t elements) {
  using Sum = Accumulator<kDtype>;
  const hn::CappedTag<Sum, kDotLanes> d;
  constexpr std::size_t kLanes = hn::MaxLanes(decltype(d)());
  constexpr std::size_t kVectors = kDotLanes / kLanes;
  const auto* a = static_cast<const Element<kDtype>*>(a_row);
  const auto* b = static_cast<const Element<kDtype>*>(b_row);

  hn::Vec<decltype(d)> sums[kVectors];
  for (auto& sum : sums) sum = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + kDotLanes <= elements; i += kDotLanes) dot_step<kDtype>(d, sums, a + i, b + i, std::make_index_sequence<kVectors>());
  HWY_ALIGN Sum lanes[kDotLanes];
  for (std::size_t v = 0; v < kVectors; ++v) hn::Store(sums[v], d, lanes + v * kLanes);

  // The rest lane by lane: a padding product of +0 would turn a lane's -0 into +0.
  const hn::CappedTag<Sum, 1> one;
  for (Sum* lane = lanes; i < elements; ++i, ++lane) {
    *lane = std::fma(hn::GetLane(load<kDtype>(one, a + i)), hn::GetLane(load<kDtype>(one, b + i)), *lane);
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
