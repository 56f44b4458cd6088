#include <algorithm>
#include <cmath>

#include "core/usage.h"
#include "routing/arithmetic.h"
#include "routing/gate.h"
#include "routing/row_scores.h"
#include "tokenyard/routing.h"

namespace tokenyard {
namespace {

using routing_internal::exp_of_negative;
using routing_internal::kNever;
using routing_internal::precedes;
using routing_internal::RowScores;
using routing_internal::TopK;

// Routes one row after another; the vectors are scratch.
class Router {
 public:
  Router(const RoutingInput& input, const Gate& gate)
      : input_(input),
        gate_(gate),
        score_(routing_internal::score_of(gate)),
        num_experts_(static_cast<int>(input.logits.shape[1])),
        softmax_over_chosen_(routing_internal::is_softmax_over_chosen(gate)),
        row_(input, gate),
        choice_(static_cast<std::size_t>(num_experts_)) {}

  // ids, weights: [top_k] of this token.
  void route(std::int64_t token, std::int64_t* ids, float* weights) {
    std::fill_n(ids, gate_.top_k, -1);
    std::fill_n(weights, gate_.top_k, 0.0F);
    if (!row_.load(token)) return;
    if (!softmax_over_chosen_) row_.score();
    if (input_.given_ids) {
      read_given(token, ids);
    } else {
      select(ids);
    }
    weigh(ids, weights);
  }

 private:
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
        const float biased = row_.scores()[expert] + input_.bias.as<float>()[expert * input_.bias.strides[0]];
        choice_[expert] = row_.logits()[expert] == kNever || !std::isfinite(biased) ? kNever : biased;
      }
      return;
    }
    choice_ = row_.logits();
    if (score_ == Score::softmax) return;
    for (int expert = 0; expert < num_experts_; ++expert) {
      if (row_.logits()[expert] != kNever) choice_[expert] = row_.scores()[expert];
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
      if (ids[k] >= 0) highest = std::max(highest, row_.logits()[ids[k]]);
    }
    float sum = 0;
    for (int k = 0; k < gate_.top_k; ++k) {
      if (ids[k] < 0) continue;
      weights[k] = softmax_over_chosen_ ? exp_of_negative(row_.logits()[ids[k]] - highest) : row_.scores()[ids[k]];
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
  bool softmax_over_chosen_;
  RowScores row_;  // its scores are not filled where the weights are a softmax over the chosen
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
