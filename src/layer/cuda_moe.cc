#include "layer/cuda_moe.h"

#include "core/usage.h"
#include "experts/row_block.h"
#include "layer/cuda/kernels.h"
#include "layer/moe_checks.h"

namespace tokenyard::layer_internal {
namespace {

using Phase = exchange_internal::CudaTrace::Phase;
using experts_internal::check_dense;
using experts_internal::check_rows;

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
const std::byte* data_of(const ConstTensorView& view) { return static_cast<const std::byte*>(view.data); }
// A tensor of one row may have any stride.
std::int64_t stride_of(const ConstTensorView& view) { return view.shape[0] > 1 ? view.strides[0] : view.shape[1]; }

layer_cuda::RowsArgs rows_args(const ConstTensorView& a, const ConstTensorView& b, const TensorView& out) {
  return {.num_rows = out.shape[0],
          .columns = out.shape[1],
          .dtype = out.dtype,
          .a = data_of(a),
          .a_stride = stride_of(a),
          .b = data_of(b),
          .b_stride = stride_of(b),
          .out = static_cast<std::byte*>(out.data),
          .out_stride = stride_of(out)};
}

constexpr int kCallsOfAStep = 2;  // a dispatch and a combine

// A call of the exchange, which tells its ranks by itself when it refuses one. TransportErrors are of earlier calls: this one was not made.
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

void check_launch(const char* what) { cuda_check(cudaGetLastError(), what); }

}  // namespace

CudaMoe::CudaMoe(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options)
    : group_(std::move(group)),
      weights_(weights),
      gate_(weights.gate, options.gate),
      activation_(options.activation),
      num_local_experts_(local_experts_of(*group_, options, gate_)) {
  layer_internal::check_weights(*group_, weights, num_local_experts_);
  if (has_shared()) layer_internal::check_dense(weights.shared);
  check_weights();
  if (group_->exchange() != nullptr) placement_ = group_->add(placement_of(*group_, options, gate_.num_experts()));
  rehearse();
  group_->world().barrier();
}

Dtype CudaMoe::dtype() const {
  if (!has_weights()) return group_->options().dtype;
  return num_local_experts_ > 0 ? weights_.experts.w13.dtype : weights_.shared.weights.w13.dtype;
}

void CudaMoe::check_weights() const {
  const ExpertGroupOptions& most = group_->options();
  if (gate_.num_experts() > most.num_experts || gate_.gate().top_k > most.top_k) {
    usage_error("{} experts and top_k = {}; the group was made for {} and {} at most", gate_.num_experts(), gate_.gate().top_k,
                most.num_experts, most.top_k);
  }
  check_dense("gate.weight", weights_.gate.weight, {gate_.num_experts(), gate_.hidden_size()});
  const ConstTensorView& shared = weights_.shared.weights.w13;
  if (shared && num_local_experts_ > 0 && shared.dtype != weights_.experts.w13.dtype) {
    usage_error("experts.w13 is {} and that of the shared expert {}; on GPUs use one dtype", describe(weights_.experts.w13),
                describe(shared));
  }
  const auto check_feed_forward = [this](const ExpertWeights& of) {
    check_memory("w13", of.w13);
    check_memory("w2", of.w2);
    check_memory("w13_bias", of.w13_bias);
    check_memory("w2_bias", of.w2_bias);
  };
  check_feed_forward(weights_.experts);
  check_feed_forward(weights_.shared.weights);
  check_memory("gate.weight", weights_.gate.weight);
  check_memory("gate.logit_bias", weights_.gate.logit_bias);
  check_memory("gate.selection_bias", weights_.gate.selection_bias);
  check_memory("the gate of the shared expert", weights_.shared.gate);
}

void CudaMoe::check_memory(const char* what, const ConstTensorView& view) const {
  if (view.data == nullptr || view.num_elements() == 0) return;
  cudaPointerAttributes attributes{};
  cuda_check(cudaPointerGetAttributes(&attributes, view.data), "cudaPointerGetAttributes");
  if (attributes.type == cudaMemoryTypeUnregistered ||
      (attributes.type == cudaMemoryTypeDevice && attributes.device != workspace().device()))
    usage_error("{} is {} in {}; this layer is on GPU {}: copy it there first", what, describe(view),
                attributes.type == cudaMemoryTypeDevice ? fmt::format("the memory of GPU {}", attributes.device) : "ordinary host memory",
                workspace().device());
}

void CudaMoe::check(const ConstTensorView& x, const ConstTensorView& out, const MoeStepOptions& options) const {
  const ExpertGroupOptions& most = group_->options();
  check_rows("x", x, x.ndim == 2 ? x.shape[0] : 0, gate_.hidden_size());
  check_rows("out", out, x.shape[0], x.shape[1]);
  if (options.sliced_out) usage_error("sliced_out without same_tokens; every rank has its own tokens: out is all of them");
  if (out.dtype != x.dtype) usage_error("x is {} and out {}; use one dtype", describe(x), describe(out));
  if (has_weights() && x.dtype != dtype()) {
    usage_error("x is {} and this layer's weights are {}; on GPUs rows and weights are of one dtype", describe(x), name(dtype()));
  }
  if (x.shape[0] > most.max_tokens_per_rank || size_of(x.dtype) > size_of(most.dtype)) {
    usage_error("x is {}; the group was made for at most {} tokens of {}", describe(x), most.max_tokens_per_rank, name(most.dtype));
  }
  if (options.logits) experts_internal::check_float32("logits", options.logits, {x.shape[0], gate_.num_experts()});
  check_memory("x", x);
  check_memory("out", out);
  check_memory("mask", options.mask);
  check_memory("given_ids", options.given_ids);
  check_memory("logits", options.logits);
}

void CudaMoe::forward(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, MoeActivations* saved) {
  if (group_->exchange() != nullptr) group_->exchange()->check();  // of earlier steps: this one is not begun
  int owed = group_->exchange() != nullptr ? kCallsOfAStep : 0;
  try {
    if (saved != nullptr) usage_error("activations for backward; on GPUs this layer goes forward only: give none, or train on CPUs");
    forward_steps(x, out, options, owed);
  } catch (const UsageError& error) {
    leave(owed, error.what());
    throw;
  } catch (const TransportError& error) {
    if (error.failure().kind == FailureKind::aborted) leave(owed, error.failure().detail);
    throw;
  }
}

// Whoever leaves a step makes its calls all the same, as rejections: all ranks count alike, and the next step is fine.
void CudaMoe::leave(int owed, const std::string& reason) {
  while (owed > 0) {
    try {
      group_->exchange()->abandon(reason);
      --owed;
    } catch (const TransportError& error) {  // of an earlier call, told once
      if (error.failure().kind != FailureKind::aborted) return;
    }
  }
}

void CudaMoe::backward(const MoeBackwardInput& /*input*/, const MoeActivations& /*saved*/, const TensorView& /*d_x*/,
                       const MoeGradients& /*gradients*/) {
  usage_error("backward on a GPU; there this layer goes forward only: train on CPUs, or with the exchange and DeviceExperts");
}

void CudaMoe::forward_steps(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, int& owed) {
  const CudaDeviceScope scope(workspace().device());
  check(x, out, options);
  const cudaStream_t stream = stream_of(options.stream);
  Exchange* const exchange = group_->exchange();
  CallOrder& order = workspace().order();
  order.enter(stream);
  const DeviceRouting routing = run_gate(x, options);
  if (exchange == nullptr) {
    run_here(x, routing, out, stream);
    order.leave(stream);
    return;
  }
  ConstTensorView shared;
  Received received = dispatch(x, routing, options, shared, owed);
  const TensorView y = run_experts(received, x.shape[1], stream);
  const Handle handle = received.handle();
  received.release(stream);
  const Phase phase(workspace().trace(), "combine", 0, stream);
  made(owed,
       [&] { return exchange->combine(y, handle, {.weighting = Weighting::at_expert, .bias0 = shared, .out = out, .stream = stream}); });
  order.leave(stream);
}

DeviceRouting CudaMoe::run_gate(const ConstTensorView& x, const MoeStepOptions& options) {
  const cudaStream_t stream = stream_of(options.stream);
  const std::int64_t tokens = x.shape[0], num_experts = gate_.num_experts();
  const GateWeights& weights = weights_.gate;
  const TensorView logits = options.logits ? options.logits : workspace().logits(tokens, num_experts);
  {
    const Phase phase(workspace().trace(), "gate", 0, stream);
    layer_cuda::gate_product({.num_tokens = tokens,
                              .num_experts = static_cast<int>(num_experts),
                              .hidden_size = static_cast<int>(x.shape[1]),
                              .x_dtype = x.dtype,
                              .w_dtype = weights.weight.dtype,
                              .bias_dtype = weights.logit_bias.dtype,
                              .x = data_of(x),
                              .x_stride = stride_of(x),
                              .w = data_of(weights.weight),
                              .bias = data_of(weights.logit_bias),
                              .logits = logits.as<float>(),
                              .parts = workspace().gate_parts()},
                             workspace().multiprocessors(), stream);
    check_launch("launch of the gate's product");
  }
  const Phase phase(workspace().trace(), "route", 0, stream);
  const DeviceRouting routing = workspace().routing(tokens, num_experts, gate_.gate().top_k);
  route({.logits = logits, .bias = weights.selection_bias, .mask = options.mask, .given_ids = options.given_ids}, gate_.gate(), routing,
        stream);
  return routing;
}

Received CudaMoe::dispatch(const ConstTensorView& x, const DeviceRouting& routing, const MoeStepOptions& options, ConstTensorView& shared,
                           int& owed) {
  const DispatchInput input = {.rows = x, .topk_ids = routing.topk_ids, .topk_weights = routing.topk_weights};
  const DispatchOptions how = {
      .placement = placement_, .layout = Layout::expert_major, .sizing = Sizing::capacity, .mode = options.mode, .stream = options.stream};
  const Phase phase(workspace().trace(), "dispatch", 0, stream_of(options.stream));
  if (!has_shared()) return made(owed, [&] { return group_->exchange()->dispatch(input, how); });
  Pending<Received> rows = made(owed, [&] { return group_->exchange()->start_dispatch(input, how); });
  shared = run_shared(x, options.stream);  // while rows travel
  return rows.finish();
}

ConstTensorView CudaMoe::run_shared(const ConstTensorView& x, void* stream) {
  const Phase phase(workspace().trace(), "shared", 0, stream_of(stream));
  const TensorView out = workspace().shared(x.dtype, x.shape[0], x.shape[1]);
  workspace().experts().experts_forward({.x = x}, workspace().all_rows(x.shape[0]), weights_.shared.weights, activation_, out, stream);
  const ConstTensorView& gate = weights_.shared.gate;
  if (!gate) return out;
  layer_cuda::scale_by_gate(rows_args(x, out, out), data_of(gate), gate.dtype, stream_of(stream));
  check_launch("launch of the shared expert's gate");
  return out;
}

TensorView CudaMoe::run_experts(const Received& received, std::int64_t hidden_size, void* stream) {
  const Phase phase(workspace().trace(), "experts", 0, stream_of(stream));
  const DeviceRowGroups groups = DeviceRowGroups::of(received);
  const TensorView y = workspace().places(received.rows().dtype, groups.places, hidden_size);
  if (num_local_experts_ > 0) {
    workspace().experts().experts_forward({.x = received.rows()}, groups, weights_.experts, activation_, y, stream);
  }
  return y;
}

// Without an exchange: every expert is here.
void CudaMoe::run_here(const ConstTensorView& x, const DeviceRouting& routing, const TensorView& out, void* stream) {
  if (x.shape[0] == 0) return;
  const ConstTensorView shared = has_shared() ? run_shared(x, stream) : ConstTensorView();
  const Phase phase(workspace().trace(), "experts", 0, stream_of(stream));
  DeviceExperts& experts = workspace().experts();
  const DeviceRowGroups groups = experts.gather(routing.topk_ids, num_local_experts_, stream);
  const TensorView y = workspace().places(x.dtype, groups.places, x.shape[1]);
  experts.experts_forward({.x = x}, groups, weights_.experts, activation_, y, stream);
  const TensorView sums = shared ? workspace().sums(x.dtype, x.shape[0], x.shape[1]) : out;
  experts.unpermute({y, routing.topk_ids, routing.topk_weights}, groups, sums, stream);
  if (!shared) return;
  layer_cuda::add_rows(rows_args(sums, shared, out), stream_of(stream));
  check_launch("launch of a sum of rows");
}

void CudaMoe::rehearse() {
  const CudaDeviceScope scope(workspace().device());
  const auto stream = value_or_throw(borrow_cuda_stream());
  const std::int64_t hidden_size = gate_.hidden_size(), most = group_->options().max_tokens_per_rank;
  workspace().order().enter(stream.get());
  workspace().set_quiet(true);
  DeviceExperts& experts = workspace().experts();
  for (const std::int64_t tokens : {std::int64_t{1}, most}) {  // a product in parts, and one in a piece
    const TensorView x = workspace().shared(dtype(), tokens, hidden_size);
    const DeviceRouting routing = run_gate(x, {.stream = stream.get()});
    if (has_shared()) run_shared(x, stream.get());
    if (group_->exchange() == nullptr) run_here(x, routing, workspace().sums(dtype(), tokens, hidden_size), stream.get());
  }
  if (group_->exchange() != nullptr && num_local_experts_ > 0) {
    const std::int64_t places = workspace().max_places();
    const TensorView y = workspace().places(dtype(), places, hidden_size);
    experts.experts_forward({.x = y}, workspace().no_rows(places, num_local_experts_), weights_.experts, activation_, y, stream.get());
  }
  workspace().set_quiet(false);
  workspace().order().leave(stream.get());
  cuda_check(cudaStreamSynchronize(stream.get()), "rehearsing a layer");
}

void CudaMoe::warm_up(std::span<const std::int64_t> token_counts) {
  const std::int64_t hidden_size = gate_.hidden_size(), top_k = gate_.gate().top_k, most = group_->options().max_tokens_per_rank;
  for (const std::int64_t tokens : token_counts) {
    if (tokens < 0 || tokens > most) usage_error("warm_up: {} tokens; expected 0 to {}, the group's max_tokens_per_rank", tokens, most);
  }
  const CudaDeviceScope scope(workspace().device());
  const auto stream = value_or_throw(borrow_cuda_stream());
  const Dtype rows = dtype();
  const auto make = [&](std::int64_t bytes) {
    return value_or_throw(make_device_buffer(workspace().device(), static_cast<std::size_t>(bytes)));
  };
  const DeviceBuffer x = make(most * hidden_size * size_of(rows)), ids = make(most * top_k * size_of(Dtype::int64));
  std::vector<std::int64_t> balanced(static_cast<std::size_t>(most * top_k));
  const std::int64_t first = group_->world().rank() * most * top_k;
  for (std::int64_t i = 0; i < std::ssize(balanced); ++i) balanced[i] = (first + i) % gate_.num_experts();
  cuda_check(cudaMemcpy(ids.data(), balanced.data(), balanced.size() * sizeof(std::int64_t), cudaMemcpyHostToDevice),
             "preparing a warm-up");
  cuda_check(cudaMemset(x.data(), 0, x.bytes()), "preparing a warm-up");
  cuda_check(cudaDeviceSynchronize(), "preparing a warm-up");
  group_->world().barrier();  // nobody allocates any more
  Exchange* const exchange = group_->exchange();
  for (const std::int64_t tokens : token_counts) {
    MoeStepOptions options = {.given_ids = {ids.data(), Dtype::int64, {tokens, top_k}}, .stream = stream.get()};
    const TensorView view(x.data(), rows, {tokens, hidden_size});
    forward(view, view, options, nullptr);
    const std::int64_t slots = exchange == nullptr ? 0 : exchange->world().size() * exchange->options().max_tokens_per_rank;
    if (slots == 0 || exchange->options().receive_rows < slots) continue;
    options.mode = Mode::latency;
    forward(view, view, options, nullptr);
  }
  cuda_check(cudaStreamSynchronize(stream.get()), "a warm-up");
  if (exchange != nullptr) exchange->check();
  group_->world().barrier();  // before memory goes back, which may wait for kernels
}

std::unique_ptr<MoeEngine> make_cuda_moe(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options) {
  return std::make_unique<CudaMoe>(std::move(group), weights, options);
}

}  // namespace tokenyard::layer_internal
