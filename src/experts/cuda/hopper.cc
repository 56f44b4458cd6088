#include <utility>

#include "experts/cuda/products.h"
#include "protocol/arena.h"

namespace tokenyard::experts_cuda {
namespace {

// What is chosen here is so by measurement, see docs/experts.md.

// Groups of few rows each, as in decoding. With as much memory as either kernel works in: calls that alternate allocate nothing.
HopperKernel by_rows(const Groups& groups, HopperKernel few, HopperKernel many) {
  constexpr std::int64_t kFewRows = 64;
  if (likely_rows(groups) > kFewRows) std::swap(few, many);
  few.other_workspace_bytes = many.workspace_bytes;
  return few;
}

// Where wide tiles would compute a tenth more columns, which is what they are better by.
constexpr bool is_narrow(int columns) { return 10 * protocol::align_up(columns, 256) >= 11 * protocol::align_up(columns, 192); }
static_assert(is_narrow(384) && is_narrow(192) && !is_narrow(768) && !is_narrow(2048));
// Pairs of tiles along the columns of float8 products.
constexpr bool fills_pairs(int columns) { return protocol::align_up(columns, 256) == protocol::align_up(columns, 128); }

}  // namespace

std::optional<HopperKernel> hopper_kernel(const GroupedArgs& args) {
  if (args.dtype != Dtype::bfloat16 && args.dtype != Dtype::float16) return {};
  const bool is_bf16 = args.dtype == Dtype::bfloat16, narrow = is_narrow(args.n);
  switch (args.product) {
    case Product::forward:
      return is_bf16 ? by_rows(args.groups, forward_few_bf16(), narrow ? forward_narrow_bf16() : forward_bf16())
                     : by_rows(args.groups, forward_few_fp16(), narrow ? forward_narrow_fp16() : forward_fp16());
    case Product::dgrad:
      if (narrow) return is_bf16 ? dgrad_narrow_bf16() : dgrad_narrow_fp16();
      return is_bf16 ? dgrad_bf16() : dgrad_fp16();
    case Product::wgrad:
      return is_bf16 ? wgrad_bf16() : wgrad_fp16();
  }
  return {};
}

std::optional<ScaledKernel> scaled_kernel(const ScaledArgs& args) {
  if (args.out != Dtype::bfloat16 && args.out != Dtype::float16) return {};
  const bool is_bf16 = args.out == Dtype::bfloat16;
  if (fills_pairs(args.hopper.grouped.n)) return is_bf16 ? forward_fp8_pairs_to_bf16() : forward_fp8_pairs_to_fp16();
  return is_bf16 ? forward_fp8_to_bf16() : forward_fp8_to_fp16();
}

}  // namespace tokenyard::experts_cuda
