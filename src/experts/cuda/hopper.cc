#include <utility>

#include "experts/cuda/products.h"

namespace tokenyard::experts_cuda {
namespace {

// With as much memory as either kernel works in: calls that alternate between them allocate nothing.
template <class Kernel>
Kernel by_rows(const Groups& groups, Kernel few, Kernel many) {
  if (!has_few_rows(groups)) std::swap(few, many);
  few.other_workspace_bytes = many.workspace_bytes;
  return few;
}

}  // namespace

std::optional<HopperKernel> hopper_kernel(const GroupedArgs& args) {
  if (args.dtype != Dtype::bfloat16 && args.dtype != Dtype::float16) return {};
  const bool is_bf16 = args.dtype == Dtype::bfloat16;
  switch (args.product) {
    case Product::forward:
      return is_bf16 ? by_rows(args.groups, forward_few_bf16(), forward_bf16()) : by_rows(args.groups, forward_few_fp16(), forward_fp16());
    case Product::dgrad:
      return is_bf16 ? dgrad_bf16() : dgrad_fp16();
    case Product::wgrad:
      return is_bf16 ? wgrad_bf16() : wgrad_fp16();
  }
  return {};
}

std::optional<ScaledKernel> scaled_kernel(const ScaledArgs& args) {
  if (args.out != Dtype::bfloat16 && args.out != Dtype::float16) return {};
  const Groups& groups = args.hopper.grouped.groups;
  return args.out == Dtype::bfloat16 ? by_rows(groups, forward_few_fp8_to_bf16(), forward_fp8_to_bf16())
                                     : by_rows(groups, forward_few_fp8_to_fp16(), forward_fp8_to_fp16());
}

}  // namespace tokenyard::experts_cuda
