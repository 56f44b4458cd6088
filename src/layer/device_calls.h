#pragma once
// What calls on GPUs share: arguments of kernels from tensors, and checks.

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "core/usage.h"
#include "memory/cuda_error.h"
#include "tokenyard/tensor_view.h"

namespace tokenyard::layer_internal {

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
inline const std::byte* data_of(const ConstTensorView& view) { return static_cast<const std::byte*>(view.data); }
inline std::byte* data_of(const TensorView& view) { return static_cast<std::byte*>(view.data); }
// A tensor of one row may have any stride.
inline std::int64_t stride_of(const ConstTensorView& view) { return view.shape[0] > 1 ? view.strides[0] : view.shape[1]; }
inline void check_launch(const char* what) { cuda_check(cudaGetLastError(), what); }

// UsageError for tensors that a kernel on this GPU cannot read.
inline void check_on_gpu(const char* what, const ConstTensorView& view, int gpu) {
  if (view.data == nullptr || view.num_elements() == 0) return;
  cudaPointerAttributes attributes{};
  cuda_check(cudaPointerGetAttributes(&attributes, view.data), "cudaPointerGetAttributes");
  if (attributes.type == cudaMemoryTypeUnregistered || (attributes.type == cudaMemoryTypeDevice && attributes.device != gpu))
    usage_error("{} is {} in {}; this is computed on GPU {}: copy it there first", what, describe(view),
                attributes.type == cudaMemoryTypeDevice ? fmt::format("the memory of GPU {}", attributes.device) : "ordinary host memory",
                gpu);
}

}  // namespace tokenyard::layer_internal
