// fold, reduce and scale_row: four vectors of accumulators stay in registers while all terms of their elements go by.

#include <algorithm>
#include <vector>

#include "core/visit_dtype.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sum.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/cpu/simd_inl.h"

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
      put<kStream>(raw, hn::BitCast(raw, merge(v0, v1)), to);
      put<kStream>(raw, hn::BitCast(raw, merge(v2, v3)), to + 2 * kLanes);
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
  static HWY_INLINE hn::Vec<U> merge(Vector even, Vector odd) {
    const auto upper = hn::And(round_to_upper_half(d, odd), hn::Set(U(), kUpperHalf));
    return hn::Or(hn::ShiftRight<16>(round_to_upper_half(d, even)), upper);
  }
  HWY_INLINE Block in_order() const {
    if constexpr (kSplit) {
      // Unqualified: the scalar target, which never comes here, lacks these functions.
      const auto a = InterleaveLower(d, v0, v1), b = InterleaveUpper(d, v0, v1);
      const auto e = InterleaveLower(d, v2, v3), f = InterleaveUpper(d, v2, v3);
      return {ConcatLowerLower(d, b, a), ConcatUpperUpper(d, b, a), ConcatLowerLower(d, f, e), ConcatUpperUpper(d, f, e)};
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

template <Dtype kDtype>
struct FoldKernel {
  const FoldArgs& args;

  template <bool kFull>
  HWY_INLINE void part(std::int64_t begin, std::int64_t count) const {
    auto sum = Block<kDtype>::zero();
    for (int r = 0; r < args.count; ++r) {
      const auto row = Block<kDtype>::template load_part<kFull>(args.rows[r], begin, count);
      if (args.weights) {
        sum.add_product(hn::Set(sum.d, args.weights[r]), row);
      } else {
        sum.add(row);
      }
    }
    store_part<kDtype, kFull>(sum, args.out, begin, count, false);
  }
};

void fold(const FoldArgs& args) {
  visit_summable(args.dtype, [&](auto dtype) { for_each_part<dtype.value>(FoldKernel<dtype.value>{args}, args.elements); });
}

// kGrouped at compile time: with both loops in one function the sums leave the registers.
template <Dtype kDtype, Dtype kOut, bool kGrouped>
struct ReduceKernel {
  const ReduceArgs& args;
  bool stream;

  template <bool kFull>
  HWY_INLINE void part(std::int64_t begin, std::int64_t count) const {
    using Terms = Block<kDtype>;
    auto sum = args.bias0 ? Terms::template load_part<kFull>(args.bias0, begin, count) : Terms::zero();
    sum.add(args.bias1 ? Terms::template load_part<kFull>(args.bias1, begin, count) : Terms::zero());
    if constexpr (kGrouped) {
      for (int g = 0, p = 0; g < args.num_groups; ++g) {
        auto group = Terms::zero();
        for (; p < args.group_ends[g]; ++p) group.add(Terms::template load_part<kFull>(args.partials[p], begin, count));
        group.round();
        sum.add(group);
      }
    } else {
      for (int p = 0; p < args.count; ++p) sum.add(Terms::template load_part<kFull>(args.partials[p], begin, count));
    }
    store_part<kOut, kFull>(sum, args.out, begin, count, stream);
  }
};

template <Dtype kDtype, Dtype kOut>
void reduce_row(const ReduceArgs& args) {
  constexpr std::int64_t kLine = 64, kSize = sizeof(Element<kOut>);
  // Streaming needs aligned vectors: a first part reaches the next cache line, or as near as whole blocks allow. Elements
  // that straddle lines never get there.
  const auto to_line = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(args.out) % kLine);
  const bool stream = args.stream && to_line % kSize == 0;
  const std::int64_t lead = stream ? std::min(to_line / kSize % Block<kDtype>::kElements, args.elements) : 0;
  if (args.group_ends) {
    for_each_part<kDtype>(ReduceKernel<kDtype, kOut, true>{args, stream}, args.elements, lead);
  } else {
    for_each_part<kDtype>(ReduceKernel<kDtype, kOut, false>{args, stream}, args.elements, lead);
  }
}

// float64 to float64, or neither side.
void reduce(const ReduceArgs& args) {
  visit_summable(args.dtype, [&](auto dtype) {
    visit_summable(args.out_dtype, [&](auto out_dtype) {
      if constexpr ((dtype.value == Dtype::float64) == (out_dtype.value == Dtype::float64)) reduce_row<dtype.value, out_dtype.value>(args);
    });
  });
}

template <Dtype kDtype>
struct ScaleKernel {
  void* out;
  const void* x;
  float weight;

  template <bool kFull>
  HWY_INLINE void part(std::int64_t begin, std::int64_t count) const {
    auto row = Block<kDtype>::template load_part<kFull>(x, begin, count);
    row.scale(hn::Set(row.d, weight));
    store_part<kDtype, kFull>(row, out, begin, count, false);
  }
};

void scale_row(void* out, const void* x, float weight, Dtype dtype, std::int64_t elements) {
  visit_summable(dtype, [&](auto type) { for_each_part<type.value>(ScaleKernel<type.value>{out, x, weight}, elements); });
}

}  // namespace tokenyard::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tokenyard::cpu {

HWY_EXPORT(fold);
HWY_EXPORT(reduce);
HWY_EXPORT(scale_row);

namespace {

// The nearest odd-or-exact float32: rounding it once more, to at most 22 bits, is rounding the double once.
float round_to_odd(double value) {
  const auto nearest = static_cast<float>(value);
  const auto bits = std::bit_cast<std::uint32_t>(nearest);
  if (nearest == value || std::isnan(value) || (bits & 1)) return nearest;
  return std::bit_cast<float>(std::fabs(nearest) > std::fabs(value) ? bits - 1 : bits + 1);
}

template <Dtype kOut>
auto round_to(double value) {
  if constexpr (kOut == Dtype::bfloat16) return float_to_bfloat16(round_to_odd(value));
  if constexpr (kOut == Dtype::float16) return float_to_float16(round_to_odd(value));
  if constexpr (kOut == Dtype::float32) {
    return std::isnan(value) ? std::bit_cast<float>(std::numeric_limits<std::int32_t>::max()) : static_cast<float>(value);
  }
  if constexpr (kOut == Dtype::float64) return std::isnan(value) ? std::bit_cast<double>(std::numeric_limits<std::int64_t>::max()) : value;
}

// float64 on one side only, which is rare: the sums first, then one conversion of each.
template <class Sum>
void reduce_then_convert(const ReduceArgs& args, Dtype sum_dtype) {
  std::vector<Sum> sums(static_cast<std::size_t>(args.elements));
  ReduceArgs to_sums = args;
  to_sums.out_dtype = sum_dtype;
  to_sums.out = sums.data();
  to_sums.stream = false;
  HWY_DYNAMIC_DISPATCH(reduce)(to_sums);
  visit_summable(args.out_dtype, [&](auto out_dtype) {
    auto* out = static_cast<std::byte*>(args.out);
    for (const Sum sum : sums) {
      const auto element = round_to<out_dtype.value>(sum);
      std::memcpy(out, &element, sizeof(element));
      out += sizeof(element);
    }
  });
}

}  // namespace

void fold(const FoldArgs& args) { HWY_DYNAMIC_DISPATCH(fold)(args); }

void reduce(const ReduceArgs& args) {
  const bool wide = args.dtype == Dtype::float64;
  if (wide == (args.out_dtype == Dtype::float64)) {
    HWY_DYNAMIC_DISPATCH(reduce)(args);
  } else if (wide) {
    reduce_then_convert<double>(args, Dtype::float64);
  } else {
    reduce_then_convert<float>(args, Dtype::float32);
  }
}

void scale_row(void* out, const void* x, float weight, Dtype dtype, std::int64_t elements) {
  HWY_DYNAMIC_DISPATCH(scale_row)(out, x, weight, dtype, elements);
}

}  // namespace tokenyard::cpu
#endif  // HWY_ONCE
