#include "experts/cuda/products.h"

namespace tokenyard::experts_cuda {

std::optional<HopperKernel> hopper_kernel(Product product, Dtype dtype) {
  if (dtype != Dtype::bfloat16 && dtype != Dtype::float16) return {};
  const bool is_bf16 = dtype == Dtype::bfloat16;
  switch (product) {
    case Product::forward:
      return is_bf16 ? forward_bf16() : forward_fp16();
    case Product::dgrad:
      return is_bf16 ? dgrad_bf16() : dgrad_fp16();
    case Product::wgrad:
      return is_bf16 ? wgrad_bf16() : wgrad_fp16();
  }
  return {};
}

std::optional<ScaledKernel> scaled_kernel(Dtype out) {
  if (out != Dtype::bfloat16 && out != Dtype::float16) return {};
  return out == Dtype::bfloat16 ? forward_fp8_to_bf16() : forward_fp8_to_fp16();
}

}  // namespace tokenyard::experts_cuda
