// reduce: the sums of a block stay in registers while all its terms go by.

#include <algorithm>
#include <vector>

#include "core/visit_dtype.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/reduce.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/cpu/block_inl.h"

HWY_BEFORE_NAMESPACE();
namespace tokenyard::cpu::HWY_NAMESPACE {

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

// The usual sum: a few partials and nothing else. Their number at compile time, and nothing to look up for a block.
template <Dtype kDtype, int kCount>
struct ReduceFewKernel {
  const void* partials[kCount];
  void* out;
  bool stream;

  ReduceFewKernel(const ReduceArgs& args, bool stream) : out(args.out), stream(stream) { std::copy_n(args.partials, kCount, partials); }

  template <bool kFull>
  HWY_INLINE void part(std::int64_t begin, std::int64_t count) const {
    auto sum = Block<kDtype>::zero();
    for (int p = 0; p < kCount; ++p) sum.add(Block<kDtype>::template load_part<kFull>(partials[p], begin, count));
    store_part<kDtype, kFull>(sum, out, begin, count, stream);
  }
};

template <Dtype kDtype>
bool reduce_few(const ReduceArgs& args, bool stream, std::int64_t lead) {
  if (args.group_ends || args.bias0 || args.bias1) return false;
  switch (args.count) {
    case 1:
      for_each_part<kDtype>(ReduceFewKernel<kDtype, 1>(args, stream), args.elements, lead);
      return true;
    case 2:
      for_each_part<kDtype>(ReduceFewKernel<kDtype, 2>(args, stream), args.elements, lead);
      return true;
    case 3:
      for_each_part<kDtype>(ReduceFewKernel<kDtype, 3>(args, stream), args.elements, lead);
      return true;
    case 4:
      for_each_part<kDtype>(ReduceFewKernel<kDtype, 4>(args, stream), args.elements, lead);
      return true;
    default:
      return false;
  }
}

template <Dtype kDtype, Dtype kOut>
void reduce_row(const ReduceArgs& args) {
  const auto [stream, lead] = row_stores<kDtype, kOut>(args.out, args.elements, args.stream);
  if constexpr (kDtype == kOut) {
    if (reduce_few<kDtype>(args, stream, lead)) return;
  }
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

}  // namespace tokenyard::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tokenyard::cpu {

HWY_EXPORT(reduce);

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

}  // namespace tokenyard::cpu
#endif  // HWY_ONCE
