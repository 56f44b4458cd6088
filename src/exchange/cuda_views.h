#pragma once
// Tensors of the caller as kernels take them.

#include <cuda_runtime_api.h>

#include "core/usage.h"
#include "kernels/cuda/kernels.h"
#include "memory/cuda_error.h"
#include "tokenyard/tensor_view.h"

namespace tokenyard::exchange_internal {

// [T][K], or [T] when K = 1.
inline cuda::Matrix matrix(const ConstTensorView& view) {
  const std::int64_t size = size_of(view.dtype);
  return {static_cast<const std::byte*>(view.data), view.strides[0] * size, view.ndim == 2 ? view.strides[1] * size : 0};
}

inline std::int64_t pitch_of(const ConstTensorView& rows) { return rows.strides[rows.ndim - 2] * size_of(rows.dtype); }

// Kernels read and write it: memory of the current device, or pinned host memory that the device addresses.
inline void check_memory(const char* what, const ConstTensorView& view) {
  if (!view || view.data == nullptr || view.num_elements() == 0) return;
  cudaPointerAttributes attributes{};
  cuda_check(cudaPointerGetAttributes(&attributes, view.data), "cudaPointerGetAttributes");
  if (attributes.type == cudaMemoryTypeUnregistered)
    usage_error("{} is {} in ordinary host memory; this exchange has device = cuda: copy it to the GPU first", what, describe(view));
  int device = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  if (attributes.type == cudaMemoryTypeDevice && attributes.device != device)
    usage_error("{} is {} on GPU {}; this exchange is on GPU {}: copy it there first", what, describe(view), attributes.device, device);
}

}  // namespace tokenyard::exchange_internal
