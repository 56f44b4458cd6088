#include "layer/moe_checks.h"

#include "core/usage.h"
#include "experts/row_block.h"

namespace tokenyard::layer_internal {

Placement placement_of(const ExpertGroup& group, const MoeLayerOptions& options, std::int64_t num_experts) {
  if (options.placement) return *options.placement;
  const bool is_virtual = group.options().expert_tp == ExpertTp::virtual_experts;
  return is_virtual ? group.placement(static_cast<int>(num_experts)) : Placement::uniform(static_cast<int>(num_experts), group.config().ep);
}

int local_experts_of(ExpertGroup& group, const MoeLayerOptions& options, const LinearGate& gate) {
  const auto num_experts = static_cast<int>(gate.num_experts());
  if (group.exchange() == nullptr) return num_experts;
  const Placement placement = placement_of(group, options, num_experts);
  if (placement.num_experts() != num_experts) {
    usage_error("the placement has {} experts and gate.weight {}; give one of this layer", placement.num_experts(), num_experts);
  }
  return static_cast<int>(placement.local_experts(group.exchange()->world().rank()).size());
}

void check_weights(const ExpertGroup& group, const MoeWeights& weights, int num_local_experts) {
  const ConstTensorView& w13 = weights.experts.w13;
  const std::int64_t hidden_size = weights.gate.weight.shape[1];
  const bool fits = w13.ndim == 4 && w13.shape[0] == num_local_experts && w13.shape[3] == hidden_size;
  if (num_local_experts > 0 && !fits) {
    usage_error("experts.w13 is {}; expected [{}, 2, width, {}]: the local experts of rank {}, of the gate's hidden_size",
                w13 ? describe(w13) : "absent", num_local_experts, hidden_size, group.world().rank());
  }
  if (num_local_experts > 0) experts_internal::check_products(weights.experts, {num_local_experts, w13.shape[2], hidden_size});
  if (hidden_size > group.options().hidden_size) {
    usage_error("gate.weight is {}; the group was made for hidden_size up to {}", describe(weights.gate.weight),
                group.options().hidden_size);
  }
}

void check_dense(const DenseWeights& weights) {
  const ConstTensorView& w13 = weights.weights.w13;
  if (w13.ndim != 4 || w13.shape[0] != 1) usage_error("w13 is {}; expected [1, 2, width, hidden_size]", w13 ? describe(w13) : "absent");
  if (experts_internal::is_float8(weights.weights)) {
    usage_error("w13 of a feed-forward of all tokens is {}; float8_e4m3 is for the experts of a MoeLayer: widen the weights",
                describe(w13));
  }
  const ConstTensorView& gate = weights.gate;
  if (gate && (gate.ndim != 2 || gate.shape[0] != 1 || gate.shape[1] != w13.shape[3])) {
    usage_error("the gate of a shared expert is {}; expected [1, {}]", describe(gate), w13.shape[3]);
  }
}

}  // namespace tokenyard::layer_internal
