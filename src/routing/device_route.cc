#include <cuda_runtime_api.h>

#include "core/usage.h"
#include "routing/cuda/gate_kernels.h"
#include "routing/gate.h"
#include "tokenyard/device_routing.h"

namespace tokenyard {

namespace kernels = routing_cuda;

namespace {

kernels::Stream stream_of(void* stream) { return static_cast<kernels::Stream>(stream); }

void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw TransportError(
      {.kind = FailureKind::system, .phase = Phase::none, .detail = fmt::format("launch of {}: {}", what, cudaGetErrorString(error))});
}

void check_tensor(const char* what, const ConstTensorView& view, Dtype dtype, std::initializer_list<std::int64_t> shape) {
  bool fits = view.ndim == static_cast<int>(shape.size()) && view.dtype == dtype && view.rows_contiguous();
  std::int64_t elements = 1, row = 1;
  std::string text;
  int dimension = 0;
  for (const std::int64_t size : shape) {
    fits = fits && view.shape[dimension] == size;
    elements *= size;
    if (dimension++ > 0) row *= size;
    text += fmt::format("{}{}", text.empty() ? "" : ", ", size);
  }
  fits = fits && (view.shape[0] <= 1 || view.strides[0] == row) && (view.data != nullptr || elements == 0);
  if (!fits) usage_error("{} is {}; expected [{}] {}, dense, in device memory", what, view ? describe(view) : "absent", text, name(dtype));
}

void check_ids(const char* what, const ConstTensorView& ids, std::int64_t tokens, int top_k) {
  const bool is_integer = ids.dtype == Dtype::int64 || ids.dtype == Dtype::int32;
  check_tensor(what, ids, is_integer ? ids.dtype : Dtype::int64, {tokens, top_k});
}

kernels::GateArgs gate_args(const RoutingInput& input, const Gate& gate) {
  routing_internal::check(input, gate);
  const ConstTensorView& logits = input.logits;
  return {.num_tokens = logits.shape[0],
          .num_experts = static_cast<int>(logits.shape[1]),
          .gate = gate,
          .score = routing_internal::score_of(gate),
          .over_chosen = routing_internal::is_softmax_over_chosen(gate),
          .dtype = logits.dtype,
          .logits = static_cast<const std::byte*>(logits.data),
          .token_stride = logits.strides[0],
          .expert_stride = logits.strides[1],
          .bias = input.bias ? input.bias.as<float>() : nullptr,
          .bias_stride = input.bias.strides[0],
          .mask = input.mask ? input.mask.as<std::uint8_t>() : nullptr,
          .mask_stride = input.mask.strides[0]};
}

kernels::Ids ids_of(const ConstTensorView& ids) {
  return {.data = const_cast<std::byte*>(static_cast<const std::byte*>(ids.data)),
          .is_wide = ids.dtype == Dtype::int64,
          .row_stride = ids.strides[0],
          .k_stride = ids.strides[1]};
}

void check_routing(const RoutingInput& input, const Gate& gate, const DeviceRouting& routing) {
  const std::int64_t tokens = input.logits.shape[0];
  check_ids("topk_ids", routing.topk_ids, tokens, gate.top_k);
  check_tensor("topk_weights", routing.topk_weights, Dtype::float32, {tokens, gate.top_k});
  check_tensor("load", routing.load, Dtype::int64, {input.logits.shape[1]});
}

// What losses read of the statistics.
kernels::LossArgs loss_args(const DeviceGateStatistics& statistics, double alpha) {
  const std::int64_t experts = statistics.load.ndim == 1 ? statistics.load.shape[0] : 0;
  check_tensor("statistics.load", statistics.load, Dtype::int64, {experts});
  check_tensor("statistics.score_sums", statistics.score_sums, Dtype::float64, {experts});
  check_tensor("statistics.squared_log_sum_exps", statistics.squared_log_sum_exps, Dtype::float64, {1});
  check_tensor("statistics.num_tokens", statistics.num_tokens, Dtype::int64, {1});
  kernels::LossArgs args;
  args.of.num_experts = static_cast<int>(experts);
  args.alpha = alpha;
  args.load = statistics.load.as<std::int64_t>();
  args.score_sums = statistics.score_sums.as<double>();
  args.squared_log_sum_exps = statistics.squared_log_sum_exps.as<double>();
  args.num_tokens = statistics.num_tokens.as<std::int64_t>();
  return args;
}

kernels::LossArgs loss_gradient_args(const RoutingInput& input, const Gate& gate, const DeviceGateStatistics& statistics, double alpha,
                                     const TensorView& d_logits) {
  const kernels::GateArgs of = gate_args(input, gate);
  kernels::LossArgs args = loss_args(statistics, alpha);
  if (args.of.num_experts != of.num_experts) {
    usage_error("the statistics are of {} experts, and logits are {}; pass those of this layer", args.of.num_experts,
                describe(input.logits));
  }
  check_tensor("d_logits", d_logits, Dtype::float32, {of.num_tokens, of.num_experts});
  args.of = of;
  args.d_logits = d_logits.as<float>();
  return args;
}

}  // namespace

void route(const RoutingInput& input, const Gate& gate, const DeviceRouting& routing, void* stream) {
  kernels::RouteArgs args = {.of = gate_args(input, gate), .given = {}, .ids = ids_of(routing.topk_ids)};
  check_routing(input, gate, routing);
  if (input.given_ids) args.given = ids_of(input.given_ids);
  args.weights = routing.topk_weights.as<float>();
  args.load = routing.load.as<unsigned long long>();
  kernels::route(args, stream_of(stream));
  check_launch("route");
}

void add_weights_gradient(const RoutingInput& input, const Gate& gate, const DeviceRouting& routing, const ConstTensorView& d_weights,
                          const TensorView& d_logits, void* stream) {
  const kernels::GateArgs of = gate_args(input, gate);
  check_routing(input, gate, routing);
  check_tensor("d_weights", d_weights, Dtype::float32, {of.num_tokens, gate.top_k});
  check_tensor("d_logits", d_logits, Dtype::float32, {of.num_tokens, of.num_experts});
  kernels::add_weights_gradient(
      {.of = of, .ids = ids_of(routing.topk_ids), .d_weights = d_weights.as<float>(), .d_logits = d_logits.as<float>()}, stream_of(stream));
  check_launch("add_weights_gradient");
}

void gate_statistics(const RoutingInput& input, const Gate& gate, const DeviceRouting& routing, const DeviceGateStatistics& statistics,
                     void* stream) {
  const kernels::GateArgs of = gate_args(input, gate);
  check_routing(input, gate, routing);
  check_tensor("statistics.load", statistics.load, Dtype::int64, {of.num_experts});
  static_cast<void>(loss_args(statistics, 0));  // checks the rest
  check_tensor("statistics.log_sum_exps", statistics.log_sum_exps, Dtype::float64, {of.num_tokens});
  kernels::gate_statistics({.of = of,
                            .routed_load = routing.load.as<std::int64_t>(),
                            .load = statistics.load.as<std::int64_t>(),
                            .score_sums = statistics.score_sums.as<double>(),
                            .squared_log_sum_exps = statistics.squared_log_sum_exps.as<double>(),
                            .num_tokens = statistics.num_tokens.as<std::int64_t>(),
                            .log_sum_exps = statistics.log_sum_exps.as<double>()},
                           stream_of(stream));
  check_launch("gate_statistics");
}

void balance_loss(const DeviceGateStatistics& statistics, double alpha, const TensorView& loss, void* stream) {
  kernels::LossArgs args = loss_args(statistics, alpha);
  check_tensor("loss", loss, Dtype::float64, {1});
  args.loss = loss.as<double>();
  kernels::balance_loss(args, stream_of(stream));
  check_launch("balance_loss");
}

void z_loss(const DeviceGateStatistics& statistics, double alpha, const TensorView& loss, void* stream) {
  kernels::LossArgs args = loss_args(statistics, alpha);
  check_tensor("loss", loss, Dtype::float64, {1});
  args.loss = loss.as<double>();
  kernels::z_loss(args, stream_of(stream));
  check_launch("z_loss");
}

void add_balance_gradient(const RoutingInput& input, const Gate& gate, const DeviceGateStatistics& statistics, double alpha,
                          const TensorView& d_logits, void* stream) {
  kernels::add_balance_gradient(loss_gradient_args(input, gate, statistics, alpha, d_logits), stream_of(stream));
  check_launch("add_balance_gradient");
}

void add_z_gradient(const RoutingInput& input, const Gate& gate, const DeviceGateStatistics& statistics, double alpha,
                    const TensorView& d_logits, void* stream) {
  kernels::add_z_gradient(loss_gradient_args(input, gate, statistics, alpha, d_logits), stream_of(stream));
  check_launch("add_z_gradient");
}

void update_gate_bias(const TensorView& bias, const ConstTensorView& load, float gamma, void* stream) {
  const std::int64_t experts = load.ndim == 1 ? load.shape[0] : 0;
  check_tensor("load", load, Dtype::int64, {experts});
  check_tensor("bias", bias, Dtype::float32, {experts});
  if (!(gamma - gamma == 0)) usage_error("gamma = {}; it is finite", gamma);
  kernels::update_gate_bias(bias.as<float>(), load.as<std::int64_t>(), static_cast<int>(experts), gamma, stream_of(stream));
  check_launch("update_gate_bias");
}

}  // namespace tokenyard
