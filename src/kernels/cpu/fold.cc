// fold and scale_row: the sums of a block stay in registers while all its terms go by.

#include "core/visit_dtype.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/fold.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/cpu/block_inl.h"

HWY_BEFORE_NAMESPACE();
namespace tokenyard::cpu::HWY_NAMESPACE {

template <Dtype kDtype>
struct FoldKernel {
  const FoldArgs& args;
  bool stream;

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
    store_part<kDtype, kFull>(sum, args.out, begin, count, stream);
  }
};

void fold(const FoldArgs& args) {
  visit_summable(args.dtype, [&](auto dtype) {
    const auto [stream, lead] = row_stores<dtype.value, dtype.value>(args.out, args.elements, args.stream);
    for_each_part<dtype.value>(FoldKernel<dtype.value>{args, stream}, args.elements, lead);
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
HWY_EXPORT(scale_row);

void fold(const FoldArgs& args) { HWY_DYNAMIC_DISPATCH(fold)(args); }

void scale_row(void* out, const void* x, float weight, Dtype dtype, std::int64_t elements) {
  HWY_DYNAMIC_DISPATCH(scale_row)(out, x, weight, dtype, elements);
}

}  // namespace tokenyard::cpu
#endif  // HWY_ONCE
