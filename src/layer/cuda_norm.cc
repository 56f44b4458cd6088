// Residual + RMSNorm on GPUs: checks, and one or two kernels on the caller's stream.

#include "layer/buffer.h"
#include "layer/cuda/kernels.h"
#include "layer/device_calls.h"
#include "layer/norm_checks.h"
#include "memory/cuda_handle.h"

namespace tokenyard {

using namespace layer_internal;  // NOLINT(google-build-using-namespace): this file is a part of it

namespace {

std::int64_t stride_or_none(const ConstTensorView& view) { return view ? stride_of(view) : 0; }

// The GPU that has a tensor.
int gpu_of(const char* what, const ConstTensorView& view) {
  cudaPointerAttributes attributes{};
  cuda_check(cudaPointerGetAttributes(&attributes, view.data), "cudaPointerGetAttributes");
  if (attributes.type == cudaMemoryTypeUnregistered) {
    usage_error("{} is {} in ordinary host memory; copy it to a GPU, or leave out the stream to compute it on the CPU", what,
                describe(view));
  }
  return attributes.device;
}

void check_inverse(const NormGradient& input, const ConstTensorView& d_weight) {
  if (d_weight && !input.inverse) {
    usage_error("d_weight without inverse; on GPUs give both, inverse as forward left it in NormOutput::inverse");
  }
}

// Runs what this rank does before its call, and tells the others when it will not make it.
template <class Before>
void before_call(DeviceCollectives& collectives, void* stream, Before&& before) {
  try {
    before();
  } catch (const UsageError& error) {
    collectives.abandon(error.what(), stream);
    throw;
  }
}

}  // namespace

void residual_norm(const ResidualInput& input, const RmsNorm& norm, const NormOutput& output, void* stream) {
  check_norm(input, norm, output);
  if (input.x.num_elements() == 0) return;
  const int gpu = gpu_of("x", input.x);
  check_on_gpu("residual", input.residual, gpu);
  check_on_gpu("bias", input.bias, gpu);
  check_on_gpu("norm.weight", norm.weight, gpu);
  check_on_gpu("output.residual", output.residual, gpu);
  check_on_gpu("output.out", output.out, gpu);
  check_on_gpu("output.inverse", output.inverse, gpu);
  const CudaDeviceScope scope(gpu);
  layer_cuda::norm_rows({.num_rows = input.x.shape[0],
                         .columns = input.x.shape[1],
                         .dtype = input.x.dtype,
                         .weight_dtype = norm.weight.dtype,
                         .epsilon = norm.epsilon,
                         .x = data_of(input.x),
                         .x_stride = stride_of(input.x),
                         .residual = data_of(input.residual),
                         .residual_stride = stride_or_none(input.residual),
                         .bias = data_of(input.bias),
                         .weight = data_of(norm.weight),
                         .kept = data_of(output.residual),
                         .kept_stride = stride_of(output.residual),
                         .out = data_of(output.out),
                         .out_stride = stride_of(output.out),
                         .inverse = output.inverse.as<float>()},
                        stream_of(stream));
  check_launch("launch of a norm");
}

void reduce_scatter_norm(DeviceCollectives& collectives, const ResidualInput& input, const RmsNorm& norm, const NormOutput& output,
                         void* stream) {
  const ResidualInput sums = {output.out, input.residual, input.bias};
  before_call(collectives, stream, [&] { check_norm(sums, norm, output); });
  collectives.reduce_scatter_v(input.x, slice_counts(rows_in("x", input.x), collectives.world().size()), output.out, stream);
  residual_norm(sums, norm, output, stream);
}

void norm_all_gather(DeviceCollectives& collectives, const ResidualInput& input, const RmsNorm& norm, const NormOutput& output,
                     void* stream) {
  const SliceOf slice(collectives.world(), rows_in("output.out", output.out));
  const TensorView mine = rows_of(output.out, slice.begin, slice.count);
  before_call(collectives, stream, [&] { residual_norm(input, norm, {output.residual, mine, output.inverse}, stream); });
  collectives.all_gather_v(mine, slice.counts, output.out, stream);
}

void residual_norm_backward(const NormGradient& input, const RmsNorm& norm, const TensorView& d_x, const TensorView& d_weight,
                            void* stream) {
  check_norm_backward(input, norm, d_x, d_weight);
  check_inverse(input, d_weight);
  if (input.residual.num_elements() == 0) return;
  const int gpu = gpu_of("residual", input.residual);
  check_on_gpu("d_out", input.d_out, gpu);
  check_on_gpu("d_residual", input.d_residual, gpu);
  check_on_gpu("inverse", input.inverse, gpu);
  check_on_gpu("norm.weight", norm.weight, gpu);
  check_on_gpu("d_x", d_x, gpu);
  check_on_gpu("d_weight", d_weight, gpu);
  const CudaDeviceScope scope(gpu);
  layer_cuda::differentiate_norm({.num_rows = input.residual.shape[0],
                                  .columns = input.residual.shape[1],
                                  .dtype = input.residual.dtype,
                                  .weight_dtype = norm.weight.dtype,
                                  .epsilon = norm.epsilon,
                                  .kept = data_of(input.residual),
                                  .kept_stride = stride_of(input.residual),
                                  .d_out = data_of(input.d_out),
                                  .d_out_stride = stride_of(input.d_out),
                                  .d_residual = data_of(input.d_residual),
                                  .d_residual_stride = stride_or_none(input.d_residual),
                                  .weight = data_of(norm.weight),
                                  .inverse = input.inverse.as<float>(),
                                  .d_x = data_of(d_x),
                                  .d_x_stride = stride_of(d_x),
                                  .d_weight = d_weight.as<float>()},
                                 stream_of(stream));
  check_launch("launch of the gradients of a norm");
}

void reduce_scatter_norm_backward(DeviceCollectives& collectives, const NormGradient& input, const RmsNorm& norm, const NormOutput& d,
                                  const TensorView& d_weight, void* stream) {
  before_call(collectives, stream, [&] { residual_norm_backward(input, norm, d.residual, d_weight, stream); });
  collectives.all_gather_v(d.residual, slice_counts(rows_in("d.out", d.out), collectives.world().size()), d.out, stream);
}

void norm_all_gather_backward(DeviceCollectives& collectives, const NormGradient& input, const RmsNorm& norm, const TensorView& d_x,
                              const TensorView& d_weight, void* stream) {
  const SliceOf slice(collectives.world(), rows_in("d_out", input.d_out));
  const NormGradient sums = {input.residual, input.d_residual, d_x, input.inverse};
  before_call(collectives, stream, [&] {
    check_norm_backward(sums, norm, d_x, d_weight);
    check_inverse(sums, d_weight);
    if (input.d_residual && input.d_residual.data == d_x.data && slice.count > 0)
      usage_error("d_x is d_residual; on GPUs the sums of d_out lie in d_x first: give it memory of its own");
  });
  collectives.reduce_scatter_v(input.d_out, slice.counts, d_x, stream);
  residual_norm_backward(sums, norm, d_x, d_weight, stream);
}

}  // namespace tokenyard
