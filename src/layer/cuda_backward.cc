// Backward on GPUs: gradients go to the experts along the routing of the forward, and those of rows and routing weights come back.

#include "experts/row_block.h"
#include "layer/cuda/kernels.h"
#include "layer/cuda_calls.h"
#include "layer/steps.h"
#include "tokenyard/norm.h"

namespace tokenyard::layer_internal {
namespace {

using experts_internal::check_float32;
using experts_internal::check_rows;

// A dense matrix in a buffer.
TensorView matrix(const DeviceBuffer& buffer, Dtype dtype, std::int64_t rows, std::int64_t columns) {
  return {buffer.data(), dtype, {rows, columns}};
}

// What concerns these tokens of all; d_out may be theirs alone already.
MoeBackwardInput part_of(const MoeBackwardInput& input, const Slice& slice) {
  const auto part = [&](const ConstTensorView& of_all) { return rows_of(of_all, slice.begin, slice.count); };
  MoeBackwardInput mine = input;
  mine.x = part(input.x);
  mine.d_logits = part(input.d_logits);
  if (!input.options.sliced_out) mine.d_out = part(input.d_out);
  mine.options.mask = part(input.options.mask);
  mine.options.given_ids = part(input.options.given_ids);
  return mine;
}

}  // namespace

void CudaMoe::backward(const MoeBackwardInput& input, const MoeActivations& saved, const TensorView& d_x, const MoeGradients& gradients) {
  const CudaDeviceScope scope(workspace().device());
  guarded(input.options.stream, [&](int& owed) {
    if (shared_) shared_->begin_backward();
    if (shards_) shards_->begin(shard_calls_backward(input.options));
    check_gradients(input, saved.step().on_gpu.get(), d_x, gradients);
    backward_steps(input, saved.step(), d_x, gradients, owed);
  });
}

void CudaMoe::check_gradients(const MoeBackwardInput& input, const CudaStep* step, const ConstTensorView& d_x,
                              const MoeGradients& gradients) const {
  experts_internal::check_differentiable(weights_.experts);
  check(input.x, input.d_out, input.options);
  const std::int64_t tokens = input.x.shape[0], hidden_size = input.x.shape[1], experts = gate_.num_experts();
  check_rows("d_x", d_x, tokens, hidden_size);
  if (d_x.dtype != input.x.dtype) usage_error("x is {} and d_x {}; use one dtype", describe(input.x), describe(d_x));
  if (step == nullptr || step->num_tokens != tokens) {
    usage_error("saved is of {} tokens and x is {}; pass what forward saved for these rows", step == nullptr ? 0 : step->num_tokens,
                describe(input.x));
  }
  if (input.d_logits) check_float32("d_logits", input.d_logits, {tokens, experts});
  if (gradients.gate_weight) check_float32("gradients.gate_weight", gradients.gate_weight, {experts, hidden_size});
  if (gradients.gate_bias) check_float32("gradients.gate_bias", gradients.gate_bias, {experts});
  if (num_local_experts_ > 0) layer_internal::check_gradients(weights_.experts, gradients.experts);
  if (shared_) shared_->check_gradients(gradients.shared);
  check_memory("d_x", d_x);
  check_memory("d_logits", input.d_logits);
  check_memory("gradients.gate_weight", gradients.gate_weight);
  check_memory("gradients.gate_bias", gradients.gate_bias);
  const ExpertGradients& of = gradients.experts;
  check_dense_on_gpu({{of.w13, of.w2, of.w13_bias, of.w2_bias}, {}}, workspace().device());
}

void CudaMoe::backward_steps(const MoeBackwardInput& input, MoeStep& saved, const TensorView& d_x, const MoeGradients& gradients,
                             int& owed) {
  const CudaStep& step = *saved.on_gpu;
  const cudaStream_t stream = stream_of(input.options.stream);
  const DeviceWorkspace::Gradients& memory = workspace().gradients();
  const Slice slice = slice_of(step.num_tokens);
  const MoeBackwardInput mine = part_of(input, slice);
  const TensorView d_shared = workspace().shared(input.x.dtype, slice.count, input.x.shape[1]);
  CallOrder& order = workspace().order();
  order.enter(stream);
  if (shared_) {
    const Phase phase(workspace().trace(), "shared", 0, stream);
    shared_->backward({mine.x, mine.d_out, &step.shared, &gradients.shared, stream}, d_shared);
  }
  const ConstTensorView d_weights = group_->exchange() != nullptr ? experts_backward(input, saved, gradients.experts, owed)
                                                                  : experts_backward_here(input, step, gradients.experts);
  gate_backward(mine, step, d_weights, gradients);
  const ConstTensorView& gate = weights_.shared.gate;
  const TensorView d_mine = rows_of(d_x, slice.begin, slice.count);
  layer_cuda::add_gradients({.num_rows = slice.count,
                             .columns = input.x.shape[1],
                             .dtype = input.x.dtype,
                             .gate_dtype = gate.dtype,
                             .rows = memory.rows.data(),
                             .of_gate = memory.of_gate.as<float>(),
                             .of_shared = has_shared() ? data_of(d_shared) : nullptr,
                             .d_logits = memory.shared_logits.as<float>(),
                             .gate = data_of(gate),
                             .out = data_of(d_mine),
                             .out_stride = stride_of(d_mine)},
                            stream);
  check_launch("launch of a sum of gradients");
  if (is_sliced() && step.num_tokens > 0) shards_->gather(d_mine, slice_counts(step.num_tokens, shards_->size()), d_x, stream);
  order.leave(stream);
}

ConstTensorView CudaMoe::experts_backward(const MoeBackwardInput& input, MoeStep& saved, const ExpertGradients& gradients, int& owed) {
  const cudaStream_t stream = stream_of(input.options.stream);
  const Phase phase(workspace().trace(), "experts", 0, stream);
  const std::int64_t tokens = input.x.shape[0];
  const DeviceWorkspace::Gradients& memory = workspace().gradients();
  Exchange& exchange = *group_->exchange();
  const Handle handle = saved.received.handle();
  Received g = made(owed, [&] { return exchange.dispatch({.rows = input.d_out}, handle, {.stream = stream}); });
  const ExpertRowsGradient d =
      is_gathered() ? shards_backward(*saved.on_gpu, g.rows(), gradients, stream) : places_backward(saved, g.rows(), gradients, stream);
  g.release(stream);
  const Combined back = made(owed, [&] {
    return exchange.combine(
        d.rows, handle,
        {.row_weights = d.row_weights, .out = matrix(memory.rows, input.x.dtype, tokens, input.x.shape[1]), .stream = stream});
  });
  const TensorView d_weights = matrix(memory.weights, Dtype::float32, tokens, gate_.gate().top_k);
  cuda_check(cudaMemcpyAsync(d_weights.data, back.combined_weights.data, static_cast<std::size_t>(d_weights.num_elements()) * sizeof(float),
                             cudaMemcpyDeviceToDevice, stream),
             "copying gradients of routing weights");
  return d_weights;
}

ExpertRowsGradient CudaMoe::places_backward(const MoeStep& saved, const TensorView& g, const ExpertGradients& gradients, void* stream) {
  const CudaStep& step = *saved.on_gpu;
  const DeviceWorkspace::Gradients& memory = workspace().gradients();
  const DeviceRowGroups groups = DeviceRowGroups::of(saved.received);
  const ExpertRowsGradient d = {matrix(memory.places, g.dtype, groups.places, g.shape[1]),
                                {memory.place_weights.data(), Dtype::float32, {groups.places}}};
  if (num_local_experts_ == 0) return d;
  layer_cuda::differentiate_weights({.num_places = groups.begins.as<std::int32_t>() + num_local_experts_,
                                     .max_places = groups.places,
                                     .columns = g.shape[1],
                                     .dtype = g.dtype,
                                     .g = data_of(g),
                                     .y = data_of(step.y),
                                     .weights = saved.received.row_weights().as<float>(),
                                     .d_weights = memory.place_weights.as<float>()},
                                    workspace().multiprocessors(), stream_of(stream));
  check_launch("launch of the gradient of routing weights");
  workspace().experts().experts_backward(
      {.x = saved.received.rows(), .gate_up = step.gate_up, .dy = g, .dx = d.rows, .gradients = gradients}, groups, weights_.experts,
      activation_, stream);
  return d;
}

ConstTensorView CudaMoe::experts_backward_here(const MoeBackwardInput& input, const CudaStep& step, const ExpertGradients& gradients) {
  void* const stream = input.options.stream;
  const Phase phase(workspace().trace(), "experts", 0, stream_of(stream));
  const std::int64_t tokens = input.x.shape[0], mine = slice_of(tokens).count;
  const DeviceWorkspace::Gradients& memory = workspace().gradients();
  const TensorView d_weights = matrix(memory.weights, Dtype::float32, mine, gate_.gate().top_k);
  if (tokens == 0 && !is_gathered()) return d_weights;
  const ExpertRowsGradient d = {matrix(memory.rows, input.x.dtype, mine, input.x.shape[1]), d_weights};
  if (is_gathered())
    gathered_backward(step, input.d_out, d, gradients, stream);
  else if (is_sliced())
    slice_backward(input, step, d, gradients);
  else
    fold_backward(step, {input.x, step.routing.topk_ids, step.routing.topk_weights}, input.d_out, d, gradients, stream);
  return d_weights;
}

void CudaMoe::gate_backward(const MoeBackwardInput& input, const CudaStep& step, const ConstTensorView& d_weights,
                            const MoeGradients& gradients) {
  const cudaStream_t stream = stream_of(input.options.stream);
  const Phase phase(workspace().trace(), "gate", 0, stream);
  const std::int64_t tokens = input.x.shape[0], hidden_size = input.x.shape[1], experts = gate_.num_experts();
  if (tokens == 0) return;
  const DeviceWorkspace::Gradients& memory = workspace().gradients();
  const TensorView d_logits = matrix(memory.logits, Dtype::float32, tokens, experts);
  const auto bytes = static_cast<std::size_t>(d_logits.num_elements()) * sizeof(float);
  cuda_check(input.d_logits ? cudaMemcpyAsync(d_logits.data, input.d_logits.data, bytes, cudaMemcpyDeviceToDevice, stream)
                            : cudaMemsetAsync(d_logits.data, 0, bytes, stream),
             "preparing the gradient of logits");
  const GateWeights& weights = weights_.gate;
  const Slice slice = slice_of(step.num_tokens);
  const auto part = [&](const TensorView& of_all) { return rows_of(of_all, slice.begin, slice.count); };
  const RoutingInput routed = {
      .logits = part(step.logits), .bias = weights.selection_bias, .mask = input.options.mask, .given_ids = input.options.given_ids};
  const DeviceRouting routing = {part(step.routing.topk_ids), part(step.routing.topk_weights), step.routing.load};
  add_weights_gradient(routed, gate_.gate(), routing, d_weights, d_logits, stream);
  if (gradients.gate_bias) layer_cuda::add_column_sums(d_logits.as<float>(), tokens, experts, gradients.gate_bias.as<float>(), stream);
  if (gradients.gate_weight) {
    layer_cuda::product_of_factors({.rows = experts,
                                    .columns = hidden_size,
                                    .terms = tokens,
                                    .a = d_logits.as<float>(),
                                    .a_row_stride = 1,
                                    .a_term_stride = experts,
                                    .b = data_of(input.x),
                                    .b_stride = stride_of(input.x),
                                    .b_dtype = input.x.dtype,
                                    .out = gradients.gate_weight.as<float>(),
                                    .accumulates = true},
                                   stream);
  }
  layer_cuda::product_of_factors({.rows = tokens,
                                  .columns = hidden_size,
                                  .terms = experts,
                                  .a = d_logits.as<float>(),
                                  .a_row_stride = experts,
                                  .a_term_stride = 1,
                                  .b = data_of(weights.weight),
                                  .b_stride = hidden_size,
                                  .b_dtype = weights.weight.dtype,
                                  .out = memory.of_gate.as<float>()},
                                 stream);
  check_launch("launch of the gate's gradients");
}

void CudaMoe::rehearse_backward(void* stream) {
  const std::int64_t places = workspace().max_places(), hidden_size = gate_.hidden_size(), top_k = gate_.gate().top_k;
  if (num_local_experts_ > 0) rehearse_products(workspace(), weights_.experts, activation_, places, stream);
  if (shared_) shared_->rehearse_backward(stream);
  const MoeStepOptions options = {.stream = stream};
  const TensorView x = workspace().shared(dtype(), 1, hidden_size);
  const DeviceRouting routing = run_gate({x, options});
  const DeviceWorkspace::Gradients& memory = workspace().gradients();
  const TensorView d_weights = matrix(memory.weights, Dtype::float32, 1, top_k);
  add_weights_gradient({.logits = workspace().logits(1, gate_.num_experts()), .bias = weights_.gate.selection_bias}, gate_.gate(), routing,
                       d_weights, matrix(memory.logits, Dtype::float32, 1, gate_.num_experts()), stream);
  if ((group_->exchange() == nullptr || is_gathered()) && num_local_experts_ > 0) {
    DeviceExperts& experts = workspace().experts();
    const DeviceRowGroups groups = experts.gather(routing.topk_ids, num_local_experts_, stream);
    experts.unpermute_backward({workspace().places(dtype(), top_k, hidden_size), routing.topk_ids, routing.topk_weights}, groups, x,
                               matrix(memory.places, dtype(), top_k, hidden_size), d_weights, stream);
  }
  const std::int64_t width = num_local_experts_ > 0 ? weights_.experts.w13.shape[2] : 0;
  workspace().blocks().reserve(places * (2 * width + hidden_size) * size_of(dtype()) + static_cast<std::int64_t>(memory.logits.bytes()) +
                               (shared_ ? shared_->step_bytes() : 0) + gathered_bytes());
}

}  // namespace tokenyard::layer_internal
