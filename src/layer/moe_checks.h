#pragma once
// What a layer's weights must be, whichever engine takes them.

#include "layer/gate_step.h"

namespace tokenyard::layer_internal {

Placement placement_of(const ExpertGroup& group, const MoeLayerOptions& options, std::int64_t num_experts);
int local_experts_of(ExpertGroup& group, const MoeLayerOptions& options, const LinearGate& gate);
// UsageErrors.
void check_weights(const ExpertGroup& group, const MoeWeights& weights, int num_local_experts);
void check_dense(const DenseWeights& weights);

}  // namespace tokenyard::layer_internal
