// The public face of the MoE layer.

#include "core/usage.h"
#include "layer/moe_engine.h"

namespace tokenyard {

using namespace layer_internal;  // NOLINT(google-build-using-namespace): this file is a part of it

MoeActivations::MoeActivations() : step_(std::make_unique<MoeStep>()) {}
MoeActivations::~MoeActivations() = default;
MoeActivations::MoeActivations(MoeActivations&&) noexcept = default;
MoeActivations& MoeActivations::operator=(MoeActivations&&) noexcept = default;

const Routing& MoeActivations::routing() const {
  if (step_->logits) usage_error("the routing of a step on a GPU stays there; make it again of logits(), with route() of device_routing.h");
  return step_->gate.routing;
}
ConstTensorView MoeActivations::logits() const {
  if (step_->logits) return step_->logits;
  const std::int64_t num_experts = std::ssize(routing().load);
  return step_->gate.logits.view(Dtype::float32, step_->gate.num_tokens, num_experts);
}
const Received& MoeActivations::received() const { return step_->received; }

Mode mode_for_step(std::int64_t max_tokens_of_a_rank, std::int64_t latency_tokens) {
  return max_tokens_of_a_rank <= latency_tokens ? Mode::latency : Mode::throughput;
}

MoeLayer::MoeLayer(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options) {
  if (!group) usage_error("no group; give the layer the ExpertGroup that its ranks share");
  const bool is_on_gpu = group->options().device == Device::cuda;
  engine_ = is_on_gpu ? make_cuda_moe(std::move(group), weights, options) : make_cpu_moe(std::move(group), weights, options);
}
MoeLayer::~MoeLayer() = default;
MoeLayer::MoeLayer(MoeLayer&&) noexcept = default;
MoeLayer& MoeLayer::operator=(MoeLayer&&) noexcept = default;

void MoeLayer::forward(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, MoeActivations* saved) {
  engine_->forward(x, out, options, saved);
}

void MoeLayer::backward(const MoeBackwardInput& input, const MoeActivations& saved, const TensorView& d_x, const MoeGradients& gradients) {
  engine_->backward(input, saved, d_x, gradients);
}

void MoeLayer::warm_up(std::span<const std::int64_t> token_counts) { engine_->warm_up(token_counts); }

}  // namespace tokenyard
