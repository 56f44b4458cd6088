#pragma once
// The linear gate: logits of every token, in float32, and their gradients.

#include "layer/buffer.h"
#include "tokenyard/layer.h"

namespace tokenyard::layer_internal {

// What forward leaves for backward.
struct GateStep {
  Buffer logits;  // [T,E] float32
  Routing routing;
  std::int64_t num_tokens = 0;
};
struct GateBackwardInput {
  ConstTensorView x;               // [T,H]
  ConstTensorView d_topk_weights;  // [T,K]
  ConstTensorView d_logits;        // [T,E], optional: added
  std::int64_t first_token = 0;    // of the step: x and its gradients are those of the tokens from here
};

class LinearGate {
 public:
  LinearGate(const GateWeights& weights, const Gate& gate);
  std::int64_t num_experts() const { return weights_.weight.shape[0]; }
  std::int64_t hidden_size() const { return weights_.weight.shape[1]; }
  const Gate& gate() const { return gate_; }

  void forward(const ConstTensorView& x, const MoeStepOptions& options, GateStep& step) const;
  // The gradient of x as far as it goes through the gate: [T,H] float32, good until the next call.
  ConstTensorView backward(const GateBackwardInput& input, const MoeStepOptions& options, GateStep& step, const MoeGradients& gradients);

 private:
  ConstTensorView weight() const;  // [1,E,H]
  GateWeights weights_;
  Gate gate_;
  Buffer d_logits_, d_x_;
};

}  // namespace tokenyard::layer_internal
