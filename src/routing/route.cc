#include <algorithm>
#include <cmath>

#include "core/usage.h"
#include "routing/arithmetic.h"
#include "routing/gate.h"
#include "tokenyard/routing.h"

namespace tokenyard {
namespace {

using routing_internal::exp_of_negative;
using routing_internal::kNever;
using routing_internal::precedes;
using routing_internal::TopK;

float read_float(const ConstTensorView& row, std::int64_t index) {
  switch (row.dtype) {
    case Dtype::bfloat16:
      return bfloat16_to_float(row.as<std::uint16_t>()[index]);
    case Dtype::float16:
      return float16_to_float(row.as<std::uint16_t>()[index]);
    default:
      return row.as<float>()[index];
  }
}

// Routes one row after another; the vectors are scratch.
class Router {
 public:
  Router(const RoutingInput& input, const Gate& gate)
      : input_(input),
        gate_(gate),
        score_(routing_internal::score_of(gate)),
        num_experts_(static_cast<int>(input.logits.shape[1])),
        logits_(static_cast<std::size_t>(num_experts_)),
        scores_(logits_.size()),
        choice_(logits_.size()) {}

  // ids, weights: [top_k] of this token.
  void route(std::int64_t token, std::int64_t* ids, float* weights) {
    std::fill_n(ids, gate_.top_k, -1);
    std::fill_n(weights, gate_.top_k, 0.0F);
    if (is_masked(token) || !load_logits(token)) return;
    if (input_.given_ids) {
      read_given(token, ids);
    } else {
      select(ids);
    }
    weigh(ids, weights);
  }

 private:
  bool is_masked(std::int64_t token) const { return input_.mask && *input_.mask.row(token) == std::byte{0}; }

  // What is not finite can never be selected. Returns whether anything can.
  bool load_logits(std::int64_t token) {
    ConstTensorView row = input_.logits;
    row.data = input_.logits.row(token);
    highest_ = kNever;
    for (int expert = 0; expert < num_experts_; ++expert) {
      const float logit = read_float(row, expert * row.strides[1]);
      logits_[expert] = std::isfinite(logit) ? logit : kNever;
      highest_ = std::max(highest_, logits_[expert]);
    }
    if (highest_ == kNever) return false;
    if (score_ == Score::sigmoid) {
      std::transform(logits_.begin(), logits_.end(), scores_.begin(), routing_internal::sigmoid);
    } else if (!softmax_over_chosen()) {
      softmax_over_all();
    }
    return true;
  }

  bool softmax_over_chosen() const { return score_ == Score::softmax && gate_.renormalise && gate_.kind != GateKind::bias_corrected; }

  // Summed in ascending order of expert ids.
  void softmax_over_all() {
    float sum = 0;
    for (int expert = 0; expert < num_experts_; ++expert) {
      scores_[expert] = exp_of_negative(logits_[expert] - highest_);
      sum += scores_[expert];
    }
    for (float& score : scores_) score /= sum;
  }

  void read_given(std::int64_t token, std::int64_t* ids) const {
    const ConstTensorView& given = input_.given_ids;
    for (int k = 0; k < gate_.top_k; ++k) {
      const std::int64_t index = token * given.strides[0] + k * given.strides[1];
      const std::int64_t id = given.dtype == Dtype::int64 ? given.as<std::int64_t>()[index] : given.as<std::int32_t>()[index];
      if (id >= num_experts_) {
        usage_error("given_ids[{}, {}] = {}; with num_experts = {} an id is below {}, or negative for none", token, k, id, num_experts_,
                    num_experts_);
      }
      ids[k] = std::max<std::int64_t>(id, -1);
    }
  }

  void select(std::int64_t* ids) {
    fill_choice();
    TopK chosen(gate_.top_k);
    if (gate_.kind == GateKind::per_group) {
      for (int group = 0; group < gate_.num_groups; ++group) {
        TopK of_group(gate_.top_k / gate_.num_groups);
        for (int expert = first_of(group); expert < first_of(group + 1); ++expert) of_group.insert(choice_[expert], expert);
        for (int i = 0; i < of_group.size; ++i) chosen.insert(of_group.scores[i], of_group.ids[i]);
      }
    } else {
      if (gate_.num_groups > 1) exclude_groups();
      for (int expert = 0; expert < num_experts_; ++expert) chosen.insert(choice_[expert], expert);
    }
    std::copy_n(chosen.ids, chosen.size, ids);
  }

  // The selection score: a softmax keeps the order of its logits, so they serve without it.
  void fill_choice() {
    if (gate_.kind == GateKind::bias_corrected) {
      for (int expert = 0; expert < num_experts_; ++expert) {
        const float biased = scores_[expert] + input_.bias.as<float>()[expert * input_.bias.strides[0]];
        choice_[expert] = logits_[expert] == kNever || !std::isfinite(biased) ? kNever : biased;
      }
      return;
    }
    choice_ = logits_;
    if (score_ == Score::softmax) return;
    for (int expert = 0; expert < num_experts_; ++expert) {
      if (logits_[expert] != kNever) choice_[expert] = scores_[expert];
    }
  }

  int first_of(int group) const { return group * (num_experts_ / gate_.num_groups); }

  // A group's best score, or with bias_corrected the sum of its two best (of one, where it has no second).
  float group_score(int group) const {
    TopK best(gate_.kind == GateKind::bias_corrected ? 2 : 1);
    for (int expert = first_of(group); expert < first_of(group + 1); ++expert) best.insert(choice_[expert], expert);
    if (best.size == 0) return kNever;
    return best.size == 1 ? best.scores[0] : best.scores[0] + best.scores[1];
  }

  // Keeps the topk_groups best groups eligible, ties to the lower group.
  void exclude_groups() {
    group_scores_.resize(static_cast<std::size_t>(gate_.num_groups));
    group_order_.resize(group_scores_.size());
    for (int group = 0; group < gate_.num_groups; ++group) {
      group_scores_[group] = group_score(group);
      group_order_[group] = group;
    }
    std::sort(group_order_.begin(), group_order_.end(),
              [this](int a, int b) { return precedes(group_scores_[a], a, group_scores_[b], b); });
    for (int i = gate_.topk_groups; i < gate_.num_groups; ++i) {
      std::fill(choice_.begin() + first_of(group_order_[i]), choice_.begin() + first_of(group_order_[i] + 1), kNever);
    }
  }

  // Sums over the chosen go in the order of their slots.
  void weigh(const std::int64_t* ids, float* weights) const {
    float highest = kNever;
    for (int k = 0; k < gate_.top_k; ++k) {
      if (ids[k] >= 0) highest = std::max(highest, logits_[ids[k]]);
    }
    float sum = 0;
    for (int k = 0; k < gate_.top_k; ++k) {
      if (ids[k] < 0) continue;
      weights[k] = softmax_over_chosen() ? exp_of_negative(logits_[ids[k]] - highest) : scores_[ids[k]];
      sum += weights[k];
    }
    const float divisor = sum + gate_.epsilon;  // 0 when every score underflows, or a replay chose nothing finite
    for (int k = 0; k < gate_.top_k; ++k) {
      if (gate_.renormalise) weights[k] = divisor > 0 ? weights[k] / divisor : 0.0F;
      weights[k] *= gate_.scale;
    }
  }

  const RoutingInput& input_;
  const Gate& gate_;
  Score score_;
  int num_experts_;
  float highest_ = kNever;
  std::vector<float> logits_;
  std::vector<float> scores_;  // softmax or sigmoid; not filled where the weights are a softmax over the chosen
  std::vector<float> choice_;
  std::vector<float> group_scores_;
  std::vector<int> group_order_;
};

}  // namespace

Routing route(const RoutingInput& input, const Gate& gate) {
  routing_internal::check(input, gate);
  const std::int64_t num_tokens = input.logits.shape[0];
  Routing result;
  result.top_k = gate.top_k;
  result.topk_ids.resize(static_cast<std::size_t>(num_tokens * gate.top_k));
  result.topk_weights.resize(result.topk_ids.size());
  result.load.assign(static_cast<std::size_t>(input.logits.shape[1]), 0);
  Router router(input, gate);
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    router.route(token, &result.topk_ids[static_cast<std::size_t>(token * gate.top_k)],
                 &result.topk_weights[static_cast<std::size_t>(token * gate.top_k)]);
  }
  for (const std::int64_t id : result.topk_ids) {
    if (id >= 0) ++result.load[static_cast<std::size_t>(id)];
  }
  return result;
}

}  // namespace tokenyard
