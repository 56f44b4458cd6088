#pragma once
// What stands behind MoeLayer: one engine per kind of device, as behind Exchange.

#include <memory>

#include "layer/steps.h"

namespace tokenyard::layer_internal {

class MoeEngine {
 public:
  virtual ~MoeEngine() = default;
  // saved: nullptr when nothing will go backwards.
  virtual void forward(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, MoeActivations* saved) = 0;
  virtual void backward(const MoeBackwardInput& input, const MoeActivations& saved, const TensorView& d_x,
                        const MoeGradients& gradients) = 0;
  virtual void warm_up(std::span<const std::int64_t> token_counts) = 0;
};

// UsageError for weights that do not fit the group, or each other.
std::unique_ptr<MoeEngine> make_cpu_moe(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options);

}  // namespace tokenyard::layer_internal
