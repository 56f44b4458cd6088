#pragma once
// What calls on GPUs share: arguments of kernels from tensors, and checks.

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "core/usage.h"
#include "layer/cuda/kernels.h"
#include "memory/cuda_error.h"
#include "tokenyard/error.h"
#include "tokenyard/tensor_view.h"

namespace tokenyard::layer_internal {

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
inline const std::byte* data_of(const ConstTensorView& view) { return static_cast<const std::byte*>(view.data); }
inline std::byte* data_of(const TensorView& view) { return static_cast<std::byte*>(view.data); }
// A tensor of one row may have any stride.
inline std::int64_t stride_of(const ConstTensorView& view) { return view.shape[0] > 1 ? view.strides[0] : view.shape[1]; }
inline layer_cuda::RowsArgs rows_args(const ConstTensorView& a, const ConstTensorView& b, const TensorView& out) {
  return {.num_rows = out.shape[0],
          .columns = out.shape[1],
          .dtype = out.dtype,
          .a = data_of(a),
          .a_stride = stride_of(a),
          .b = data_of(b),
          .b_stride = stride_of(b),
          .out = data_of(out),
          .out_stride = stride_of(out)};
}
// Every byte of a dense tensor.
inline void fill(const TensorView& view, int byte, cudaStream_t stream) {
  const auto bytes = static_cast<std::size_t>(view.num_elements() * size_of(view.dtype));
  if (bytes > 0) cuda_check(cudaMemsetAsync(view.data, byte, bytes, stream), "filling a tensor");
}
constexpr int kNoExpert = 0xff;  // in every byte of an id: -1
inline void check_launch(const char* what) { cuda_check(cudaGetLastError(), what); }

// A call that tells its ranks by itself when it refuses. TransportErrors are of earlier calls: this one was not made.
template <class Call>
auto made(int& owed, Call&& call) {
  --owed;
  try {
    return call();
  } catch (const TransportError&) {
    ++owed;
    throw;
  }
}

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
