#pragma once
// What a gate is made of, and whether it fits its input.

#include "tokenyard/routing.h"

namespace tokenyard::routing_internal {

constexpr int kMaxExperts = 4096;

// What turns logits into weights.
Score score_of(const Gate& gate);
// Whether the weights are a softmax over the chosen logits only, so that the others do not matter.
bool is_softmax_over_chosen(const Gate& gate);
// UsageError, naming the values, when the gate or a tensor does not fit.
void check(const RoutingInput& input, const Gate& gate);

}  // namespace tokenyard::routing_internal
