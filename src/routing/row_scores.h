#pragma once
// One token's logits, and what a gate makes of them before it chooses.

#include <cstdint>
#include <vector>

#include "routing/gate.h"

namespace tokenyard::routing_internal {

class RowScores {
 public:
  // Both outlive this object, and fit each other.
  RowScores(const RoutingInput& input, const Gate& gate);

  // False when the token can have no expert: masked, or without a finite logit. The rest is about the token loaded last.
  bool load(std::int64_t token);
  // kNever where the logit is not finite.
  const std::vector<float>& logits() const { return logits_; }
  // Fills scores(): softmax or sigmoid of every logit, as the gate says.
  void score();
  const std::vector<float>& scores() const { return scores_; }
  // Softmax over all logits, summed in ascending order of expert ids.
  void softmax(std::vector<float>& probabilities) const;
  // log of the sum of all e^logit.
  double log_sum_exp() const;

 private:
  const RoutingInput& input_;
  Score score_;
  float highest_;
  std::vector<float> logits_;
  std::vector<float> scores_;
};

}  // namespace tokenyard::routing_internal
