// A block of a row's elements in four vectors of accumulators, and the walk over a row in blocks; once per instruction set.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/simd_inl.h"

// Highway's toggle instead of #pragma once: included again for every target.
#if defined(TY_KERNELS_CPU_BLOCK_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef TY_KERNELS_CPU_BLOCK_INL
#undef TY_KERNELS_CPU_BLOCK_INL
#else
#define TY_KERNELS_CPU_BLOCK_INL
#endif

HWY_BEFORE_NAMESPACE();
namespace tokenyard::cpu::HWY_NAMESPACE {

// Four vectors: as much as hides the latency of an addition.
//
// bfloat16 is summed in two vectors of its even and its odd elements: a shift and a mask split one load, where widening
// in order costs a shuffle for every vector.
template <Dtype kDtype>
struct Block {
  using D = hn::ScalableTag<Accumulator<kDtype>>;
  using Vector = hn::Vec<D>;
  static constexpr D d{};
  static constexpr std::int64_t kLanes = hn::MaxLanes(D());
  static constexpr std::int64_t kElements = 4 * kLanes;
  static constexpr bool kSplit = kDtype == Dtype::bfloat16 && kLanes > 1;

  Vector v0, v1, v2, v3;

  static HWY_INLINE Block zero() { return {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)}; }
  static HWY_INLINE Block load_all(const Element<kDtype>* from) {
    if constexpr (kSplit) {
      const auto low = load_halves(from);
      const auto high = load_halves(from + 2 * kLanes);
      return {even(low), odd(low), even(high), odd(high)};
    } else {
      const auto at = [&](std::int64_t v) HWY_ATTR { return load<kDtype>(d, from + v * kLanes); };
      return {at(0), at(1), at(2), at(3)};
    }
  }
  // Elements [begin, begin + count) of a row; nothing outside them is touched. kFull: count == kElements.
  template <bool kFull>
  static HWY_INLINE Block load_part(const void* row, std::int64_t begin, std::int64_t count) {
    const auto* from = static_cast<const Element<kDtype>*>(row) + begin;
    if constexpr (kFull) {
      return load_all(from);
    } else {
      return load_padded(from, count);
    }
  }

  HWY_INLINE void add(const Block& x) {
    v0 = hn::Add(v0, x.v0);
    v1 = hn::Add(v1, x.v1);
    v2 = hn::Add(v2, x.v2);
    v3 = hn::Add(v3, x.v3);
  }
  HWY_INLINE void add_product(Vector weight, const Block& x) {
    v0 = fused_multiply_add(d, weight, x.v0, v0);
    v1 = fused_multiply_add(d, weight, x.v1, v1);
    v2 = fused_multiply_add(d, weight, x.v2, v2);
    v3 = fused_multiply_add(d, weight, x.v3, v3);
  }
  HWY_INLINE void scale(Vector weight) {
    v0 = hn::Mul(weight, v0);
    v1 = hn::Mul(weight, v1);
    v2 = hn::Mul(weight, v2);
    v3 = hn::Mul(weight, v3);
  }
  // To what storing and loading again would give.
  HWY_INLINE void round() {
    v0 = rounded(v0);
    v1 = rounded(v1);
    v2 = rounded(v2);
    v3 = rounded(v3);
  }

  // kStream: past the caches; `to` is aligned to the vectors that are stored.
  template <Dtype kOut, bool kStream>
  HWY_INLINE void store_all(Element<kOut>* to) const {
    if constexpr (kSplit && kOut == Dtype::bfloat16) {
      const hn::Repartition<std::uint16_t, D> raw;
      // One look for all: the sum of numbers is one too, but for infinities, and those may take the slow way.
      if (HWY_UNLIKELY(!hn::AllFalse(d, hn::IsNaN(hn::Add(hn::Add(v0, v1), hn::Add(v2, v3)))))) {
        put<kStream>(raw, hn::BitCast(raw, merge(any_to_upper_half(v0), any_to_upper_half(v1))), to);
        put<kStream>(raw, hn::BitCast(raw, merge(any_to_upper_half(v2), any_to_upper_half(v3))), to + 2 * kLanes);
        return;
      }
      put<kStream>(raw, hn::BitCast(raw, merge(number_to_upper_half(d, v0), number_to_upper_half(d, v1))), to);
      put<kStream>(raw, hn::BitCast(raw, merge(number_to_upper_half(d, v2), number_to_upper_half(d, v3))), to + 2 * kLanes);
    } else {
      const hn::Rebind<Element<kOut>, D> raw;
      const Block x = in_order();
      put<kStream>(raw, encode<kOut>(d, x.v0), to);
      put<kStream>(raw, encode<kOut>(d, x.v1), to + kLanes);
      put<kStream>(raw, encode<kOut>(d, x.v2), to + 2 * kLanes);
      put<kStream>(raw, encode<kOut>(d, x.v3), to + 3 * kLanes);
    }
  }

 private:
  using U = hn::RebindToUnsigned<D>;
  static constexpr std::uint32_t kUpperHalf = 0xffff0000;

  static HWY_NOINLINE Block load_padded(const Element<kDtype>* from, std::int64_t count) {
    HWY_ALIGN Element<kDtype> padded[kElements] = {};
    std::memcpy(padded, from, static_cast<std::size_t>(count) * sizeof(padded[0]));
    return load_all(padded);
  }
  template <bool kStream, class Raw>
  static HWY_INLINE void put(Raw raw, hn::Vec<Raw> value, hn::TFromD<Raw>* to) {
    if constexpr (kStream) {
      hn::Stream(value, raw, to);
    } else {
      hn::StoreU(value, raw, to);
    }
  }
  static HWY_INLINE Vector rounded(Vector value) {
    if constexpr (kDtype == Dtype::bfloat16) {
      return hn::BitCast(d, hn::And(round_to_upper_half(d, value), hn::Set(U(), kUpperHalf)));
    } else {
      return decode<kDtype>(d, encode<kDtype>(d, value));
    }
  }

  static HWY_INLINE hn::Vec<U> load_halves(const std::uint16_t* from) {
    return hn::BitCast(U(), hn::LoadU(hn::Repartition<std::uint16_t, D>(), from));
  }
  static HWY_INLINE Vector even(hn::Vec<U> halves) { return hn::BitCast(d, hn::ShiftLeft<16>(halves)); }
  static HWY_INLINE Vector odd(hn::Vec<U> halves) { return hn::BitCast(d, hn::And(halves, hn::Set(U(), kUpperHalf))); }
  static HWY_INLINE hn::Vec<U> any_to_upper_half(Vector value) { return round_to_upper_half(d, value); }
  static HWY_INLINE hn::Vec<U> merge(hn::Vec<U> even, hn::Vec<U> odd) {
    const hn::Repartition<std::uint16_t, D> halves;
    return hn::BitCast(U(), hn::OddEven(hn::BitCast(halves, odd), hn::BitCast(halves, hn::ShiftRight<16>(even))));
  }
  HWY_INLINE Block in_order() const {
    if constexpr (kSplit) {  // by way of memory: how registers interleave depends on their size
      HWY_ALIGN Accumulator<kDtype> lanes[kElements];
      hn::StoreInterleaved2(v0, v1, d, lanes);
      hn::StoreInterleaved2(v2, v3, d, lanes + 2 * kLanes);
      return {hn::Load(d, lanes), hn::Load(d, lanes + kLanes), hn::Load(d, lanes + 2 * kLanes), hn::Load(d, lanes + 3 * kLanes)};
    } else {
      return *this;
    }
  }
};

template <Dtype kOut, bool kFull, Dtype kDtype>
HWY_INLINE void store_part(const Block<kDtype>& block, void* row, std::int64_t begin, std::int64_t count, bool stream) {
  auto* to = static_cast<Element<kOut>*>(row) + begin;
  if constexpr (!kFull) {
    HWY_ALIGN Element<kOut> padded[Block<kDtype>::kElements];
    block.template store_all<kOut, false>(padded);
    std::memcpy(to, padded, static_cast<std::size_t>(count) * sizeof(to[0]));
  } else if (stream) {
    block.template store_all<kOut, true>(to);
  } else {
    block.template store_all<kOut, false>(to);
  }
}

// Streaming needs aligned vectors: a first part of `lead` elements reaches the next cache line, or as near as whole blocks
// allow. Elements that straddle lines never get there.
struct RowStores {
  bool stream = false;
  std::int64_t lead = 0;
};

template <Dtype kDtype, Dtype kOut>
RowStores row_stores(const void* out, std::int64_t elements, bool stream) {
  constexpr std::int64_t kLine = 64, kSize = sizeof(Element<kOut>);
  const auto to_line = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(out) % kLine);
  if (!stream || to_line % kSize != 0) return {};
  return {true, std::min(to_line / kSize % Block<kDtype>::kElements, elements)};
}

// At most twice per row: one copy of the code is enough.
template <class Kernel>
HWY_NOINLINE void short_part(const Kernel& kernel, std::int64_t begin, std::int64_t count) {
  kernel.template part<false>(begin, count);
}

// Calls kernel.part<kFull>(begin, count) over a row: `lead` elements (less than a block) first, then whole blocks, then the rest.
template <Dtype kDtype, class Kernel>
void for_each_part(const Kernel& kernel, std::int64_t elements, std::int64_t lead = 0) {
  constexpr std::int64_t kElements = Block<kDtype>::kElements;
  if (lead > 0) short_part(kernel, 0, lead);
  std::int64_t i = lead;
  for (; i + kElements <= elements; i += kElements) kernel.template part<true>(i, kElements);
  if (i < elements) short_part(kernel, i, elements - i);
}

}  // namespace tokenyard::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // TY_KERNELS_CPU_BLOCK_INL
