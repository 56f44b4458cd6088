#include "layer/cuda_dense.h"

#include "experts/row_block.h"
#include "layer/cuda/kernels.h"
#include "layer/local_experts.h"

namespace tokenyard::layer_internal {

void check_dense_on_gpu(const DenseWeights& weights, int gpu) {
  check_on_gpu("w13", weights.weights.w13, gpu);
  check_on_gpu("w2", weights.weights.w2, gpu);
  check_on_gpu("w13_bias", weights.weights.w13_bias, gpu);
  check_on_gpu("w2_bias", weights.weights.w2_bias, gpu);
  check_on_gpu("w13_scale", weights.weights.w13_scale, gpu);
  check_on_gpu("w2_scale", weights.weights.w2_scale, gpu);
  check_on_gpu("the gate of the shared expert", weights.gate, gpu);
}

// Scratch memory of a backward of so many places: its sizes hang on them and on the number of experts alone, so products are narrow.
void rehearse_products(DeviceWorkspace& workspace, const ExpertWeights& of, const Activation& activation, std::int64_t places,
                       void* stream) {
  constexpr std::int64_t kNarrow = 16;
  DeviceExperts& experts = workspace.experts();
  const std::int64_t count = of.w13.shape[0], width = of.w13.shape[2], hidden_size = of.w13.shape[3];
  const Dtype dtype = of.w13.dtype;
  const DeviceBuffer zeros =
      value_or_throw(make_device_buffer(workspace.device(), static_cast<std::size_t>(count * 2 * kNarrow * kNarrow) * sizeof(float)));
  cuda_check(cudaMemsetAsync(zeros.data(), 0, zeros.bytes(), stream_of(stream)), "rehearsing gradients");
  const auto view = [&](Dtype type, std::initializer_list<std::int64_t> shape) { return TensorView(zeros.data(), type, shape); };
  const auto rehearse = [&](std::int64_t num_experts, std::int64_t wide, std::int64_t columns, std::int64_t rows) {
    const TensorView x = workspace.places(dtype, rows, columns);
    const bool has_experts = num_experts > 0;  // views of none need no memory
    ExpertWeights weights = {.w13 = view(dtype, {num_experts, 2, wide, columns}), .w2 = view(dtype, {num_experts, columns, wide})};
    ExpertGradients gradients = {.w13 = view(Dtype::float32, {num_experts, 2, wide, columns}),
                                 .w2 = view(Dtype::float32, {num_experts, columns, wide})};
    if (of.w13_bias && has_experts) {
      weights.w13_bias = view(dtype, {num_experts, 2, wide});
      gradients.w13_bias = view(Dtype::float32, {num_experts, 2, wide});
    }
    if (of.w2_bias && has_experts) {
      weights.w2_bias = view(dtype, {num_experts, columns});
      gradients.w2_bias = view(Dtype::float32, {num_experts, columns});
    }
    const TensorView gate_up(workspace.gradients().places.data(), dtype, {rows, 2 * wide});
    experts.experts_backward({.x = x, .gate_up = gate_up, .dy = x, .dx = x, .gradients = gradients},
                             workspace.no_rows(rows, static_cast<int>(num_experts)), weights, activation, stream);
  };
  rehearse(0, width, hidden_size, places);
  rehearse(count, kNarrow, kNarrow, places);
  cuda_check(cudaStreamSynchronize(stream_of(stream)), "rehearsing gradients");
}

CudaDense::CudaDense(ExpertGroup& group, const DenseWeights& weights, const Activation& activation)
    : workspace_(*group.workspace()), most_tokens_(group.options().max_tokens_per_rank), weights_(weights), activation_(activation) {
  check_dense_on_gpu(weights, workspace_.device());
  if (group.dense_on_gpus() != nullptr) ranks_.emplace(*group.dense_on_gpus(), most_tokens_);
}

void CudaDense::check_gradients(const DenseGradients& gradients) const {
  layer_internal::check_gradients(weights_.weights, gradients.weights);
  if (gradients.gate) experts_internal::check_float32("gradients.shared.gate", gradients.gate, {1, hidden_size()});
  check_dense_on_gpu({{gradients.weights.w13, gradients.weights.w2, gradients.weights.w13_bias, gradients.weights.w2_bias}, gradients.gate},
                     workspace_.device());
}

std::int64_t CudaDense::most_rows() const { return is_cut() ? ranks_->most_of_all() : most_tokens_; }

void CudaDense::place(CudaDenseStep& step, StepMemory& memory, std::int64_t tokens, Dtype dtype) const {
  const std::int64_t places = is_cut() ? most_rows() : tokens, width = weights_.weights.w13.shape[2];
  memory.place(step.gate_up, dtype, {places, 2 * width});
  memory.place(step.y, dtype, {gate() ? tokens : 0, hidden_size()});
  if (!is_cut()) return;
  memory.place(step.rows, dtype, {places, hidden_size()});
  memory.place(step.counts, Dtype::int32, {ranks_->size()});
  memory.place(step.total, Dtype::int32, {1});
}

// The rows of all ranks, and how many they are.
DeviceRowGroups CudaDense::gather(const ConstTensorView& x, const CudaDenseStep* step, TensorView& all, void* stream) {
  const DeviceWorkspace::Dense& scratch = workspace_.dense();
  const TensorView counts = counts_of(step), total = step != nullptr ? step->total : scratch.total();
  all = step != nullptr ? step->rows : scratch.gathered(x.dtype, most_rows(), x.shape[1]);
  ranks_->gather_counts(workspace_.number(x.shape[0]), counts, stream);
  layer_cuda::add_counts(counts.as<std::int32_t>(), ranks_->size(), most_tokens_, total.as<std::int32_t>(), stream_of(stream));
  check_launch("launch of a sum of counts");
  ranks_->gather(x, counts, all, stream);
  return workspace_.first_rows(total, most_rows());
}

void CudaDense::forward(const ConstTensorView& x, const TensorView& out, const CudaDenseStep* step, void* stream) {
  const TensorView kept = step != nullptr ? step->y : workspace_.shared(x.dtype, x.shape[0], x.shape[1]);
  const TensorView y = gate() ? kept : out;
  const TensorView gate_up = step != nullptr ? step->gate_up : TensorView();
  DeviceExperts& experts = workspace_.experts();
  if (!is_cut()) {
    experts.experts_forward({.x = x, .gate_up = gate_up}, workspace_.all_rows(x.shape[0]), weights_.weights, activation_, y, stream);
  } else {
    TensorView all;
    const DeviceRowGroups rows = gather(x, step, all, stream);
    const TensorView partial = workspace_.dense().partial(x.dtype, most_rows(), x.shape[1]);
    experts.experts_forward({.x = all, .gate_up = gate_up}, rows, weights_.weights, activation_, partial, stream);
    ranks_->reduce(partial, counts_of(step), y, stream);
  }
  if (!gate()) return;
  layer_cuda::scale_by_gate(rows_args(x, y, out), data_of(gate()), gate().dtype, stream_of(stream));
  check_launch("launch of the shared expert's gate");
}

// The gradient of what the gate multiplies.
ConstTensorView CudaDense::gate_backward(const Backward& call) {
  if (!gate()) return call.d_out;
  const ConstTensorView& x = call.x;
  const DeviceWorkspace::Gradients& memory = workspace_.gradients();
  const TensorView d_y(memory.y.data(), x.dtype, {x.shape[0], x.shape[1]});
  if (x.shape[0] == 0) return d_y;
  layer_cuda::differentiate_sigmoid({.num_rows = x.shape[0],
                                     .columns = x.shape[1],
                                     .dtype = x.dtype,
                                     .gate_dtype = gate().dtype,
                                     .x = data_of(x),
                                     .x_stride = stride_of(x),
                                     .d_out = data_of(call.d_out),
                                     .d_out_stride = stride_of(call.d_out),
                                     .y = data_of(call.step->y),
                                     .gate = data_of(gate()),
                                     .d_y = data_of(d_y),
                                     .d_logits = memory.shared_logits.as<float>()},
                                    stream_of(call.stream));
  if (call.gradients->gate) {
    layer_cuda::product_of_factors({.rows = 1,
                                    .columns = x.shape[1],
                                    .terms = x.shape[0],
                                    .a = memory.shared_logits.as<float>(),
                                    .a_term_stride = 1,
                                    .b = data_of(x),
                                    .b_stride = stride_of(x),
                                    .b_dtype = x.dtype,
                                    .out = call.gradients->gate.as<float>(),
                                    .accumulates = true},
                                   stream_of(call.stream));
  }
  check_launch("launch of the gradient of the shared expert's gate");
  return d_y;
}

void CudaDense::backward(const Backward& call, const TensorView& dx) {
  const CudaDenseStep& step = *call.step;
  const ConstTensorView d_y = gate_backward(call);
  DeviceExperts& experts = workspace_.experts();
  if (!is_cut()) {
    if (call.x.shape[0] == 0) return;
    experts.experts_backward({.x = call.x, .gate_up = step.gate_up, .dy = d_y, .dx = dx, .gradients = call.gradients->weights},
                             workspace_.all_rows(call.x.shape[0]), weights_.weights, activation_, call.stream);
    return;
  }
  const DeviceWorkspace::Dense& scratch = workspace_.dense();
  const TensorView d_all = scratch.gathered(call.x.dtype, most_rows(), hidden_size());
  const TensorView dx_all = scratch.partial(call.x.dtype, most_rows(), hidden_size());
  ranks_->gather(d_y, step.counts, d_all, call.stream);
  experts.experts_backward({.x = step.rows, .gate_up = step.gate_up, .dy = d_all, .dx = dx_all, .gradients = call.gradients->weights},
                           workspace_.first_rows(step.total, most_rows()), weights_.weights, activation_, call.stream);
  ranks_->reduce(dx_all, step.counts, dx, call.stream);
}

void CudaDense::rehearse(void* stream) {
  const TensorView out = workspace_.shared(dtype(), most_tokens_, hidden_size());
  const TensorView rows = is_cut() ? workspace_.dense().gathered(dtype(), most_rows(), hidden_size()) : out;
  const TensorView y = is_cut() ? workspace_.dense().partial(dtype(), most_rows(), hidden_size()) : out;
  workspace_.experts().experts_forward({.x = rows}, workspace_.no_rows(most_rows(), 1), weights_.weights, activation_, y, stream);
  if (gate()) layer_cuda::scale_by_gate(rows_args(out, out, out), data_of(gate()), gate().dtype, stream_of(stream));
  if (is_cut()) {
    const TensorView counts = workspace_.dense().counts();
    layer_cuda::add_counts(counts.as<std::int32_t>(), ranks_->size(), most_tokens_, workspace_.dense().total().as<std::int32_t>(),
                           stream_of(stream));
  }
  check_launch("rehearsing a feed-forward");
}

void CudaDense::rehearse_backward(void* stream) { rehearse_products(workspace_, weights_.weights, activation_, most_rows(), stream); }

std::int64_t CudaDense::step_bytes() const { return most_rows() * 2 * (weights_.weights.w13.shape[2] + hidden_size()) * size_of(dtype()); }

}  // namespace tokenyard::layer_internal
