#include "layer/gate_step.h"

#include <algorithm>

#include "core/usage.h"
#include "experts/row_block.h"

namespace tokenyard::layer_internal {
namespace {

// A product with one weight is a grouped one with one group.
RowGroups one_group(std::int64_t rows) { return {.places = rows, .begins = {0}, .counts = {rows}, .rows = {}}; }

ConstTensorView as_group(const ConstTensorView& vector) {
  return vector ? ConstTensorView(vector.data, vector.dtype, {1, vector.shape[0]}) : vector;
}

RoutingInput routing_input(const ConstTensorView& logits, const GateWeights& weights, const MoeStepOptions& options) {
  return {.logits = logits, .bias = weights.selection_bias, .mask = options.mask, .given_ids = options.given_ids};
}

// Tokens [first, first + count).
Routing part_of(const Routing& routing, std::int64_t first, std::int64_t count) {
  const auto begin = first * routing.top_k;
  const auto end = begin + count * routing.top_k;
  return {.top_k = routing.top_k,
          .topk_ids = {routing.topk_ids.begin() + begin, routing.topk_ids.begin() + end},
          .topk_weights = {routing.topk_weights.begin() + begin, routing.topk_weights.begin() + end},
          .load = routing.load};
}

}  // namespace

LinearGate::LinearGate(const GateWeights& weights, const Gate& gate) : weights_(weights), gate_(gate) {
  if (weights.weight.ndim != 2) {
    usage_error("gate.weight is {}; expected [num_experts, hidden_size]", weights.weight ? describe(weights.weight) : "absent");
  }
  const ConstTensorView& bias = weights.logit_bias;
  if (bias && (bias.ndim != 1 || bias.shape[0] != weights.weight.shape[0])) {
    usage_error("gate.logit_bias is {}; expected [{}], one per expert", describe(bias), weights.weight.shape[0]);
  }
}

ConstTensorView LinearGate::weight() const {
  ConstTensorView weight(weights_.weight.data, weights_.weight.dtype, {1, weights_.weight.shape[0], weights_.weight.shape[1]});
  return weight;
}

void LinearGate::forward(const ConstTensorView& x, const MoeStepOptions& options, GateStep& step) const {
  step.num_tokens = x.shape[0];
  const TensorView logits = step.logits.view(Dtype::float32, x.shape[0], num_experts());
  grouped_gemm(x, one_group(x.shape[0]), weight(), as_group(weights_.logit_bias), logits);
  if (options.logits) {
    experts_internal::check_float32("logits", options.logits, {x.shape[0], num_experts()});
    std::copy_n(logits.as<float>(), logits.num_elements(), options.logits.as<float>());
  }
  step.routing = route(routing_input(logits, weights_, options), gate_);
}

ConstTensorView LinearGate::backward(const GateBackwardInput& input, const MoeStepOptions& options, GateStep& step,
                                     const MoeGradients& gradients) {
  const std::int64_t tokens = input.x.shape[0];
  const std::int64_t first = input.first_token;
  const TensorView d_logits = d_logits_.view(Dtype::float32, tokens, num_experts());
  std::fill_n(d_logits.as<float>(), d_logits.num_elements(), 0.0F);
  for (std::int64_t t = 0; input.d_logits && t < tokens; ++t) {
    std::copy_n(reinterpret_cast<const float*>(input.d_logits.row(t)), num_experts(), reinterpret_cast<float*>(d_logits.row(t)));
  }
  const ConstTensorView logits = rows_of(step.logits.view(Dtype::float32, step.num_tokens, num_experts()), first, tokens);
  MoeStepOptions of_part = options;
  of_part.mask = rows_of(options.mask, first, tokens);
  of_part.given_ids = rows_of(options.given_ids, first, tokens);
  const bool is_whole = tokens == step.num_tokens;
  const Routing part = is_whole ? Routing{} : part_of(step.routing, first, tokens);
  add_weights_gradient(routing_input(logits, weights_, of_part), gate_, is_whole ? step.routing : part, input.d_topk_weights, d_logits);
  const RowGroups group = one_group(tokens);
  if (gradients.gate_weight) {
    grouped_gemm_wgrad(d_logits, input.x, group,
                       {gradients.gate_weight.data, gradients.gate_weight.dtype, {1, num_experts(), input.x.shape[1]}});
  }
  for (std::int64_t i = 0; gradients.gate_bias && i < d_logits.num_elements(); ++i) {
    gradients.gate_bias.as<float>()[i % num_experts()] += d_logits.as<float>()[i];
  }
  const TensorView d_x = d_x_.view(Dtype::float32, tokens, input.x.shape[1]);
  grouped_gemm_dgrad(d_logits, group, weight(), d_x);
  return d_x;
}

}  // namespace tokenyard::layer_internal
