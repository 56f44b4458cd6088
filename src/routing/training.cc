// Gradients and losses of gates, one row after the other.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/usage.h"
#include "routing/arithmetic.h"
#include "routing/row_scores.h"

namespace tokenyard {
namespace {

using routing_internal::exp_of_negative;
using routing_internal::RowScores;

void check_matrix(const char* what, const ConstTensorView& view, std::int64_t rows, std::int64_t columns) {
  const bool fits = view.ndim == 2 && view.shape[0] == rows && view.shape[1] == columns && view.dtype == Dtype::float32;
  const bool dense = fits && (rows <= 1 || view.strides[0] == columns) && (columns <= 1 || view.strides[1] == 1);
  if (!dense || (view.data == nullptr && rows > 0)) {
    usage_error("{} is {}; expected [{}, {}] float32, dense", what, view ? describe(view) : "absent", rows, columns);
  }
}

void check_routing(const RoutingInput& input, const Gate& gate, const Routing& routing) {
  routing_internal::check(input, gate);
  const std::int64_t num_tokens = input.logits.shape[0];
  const std::int64_t num_experts = input.logits.shape[1];
  const std::int64_t pairs = num_tokens * gate.top_k;
  if (routing.top_k != gate.top_k || std::ssize(routing.topk_ids) != pairs || std::ssize(routing.load) != num_experts) {
    usage_error("the routing has {} ids of top_k {} and {} experts, and {} with top_k {} need {}; pass what route() gave for this input",
                routing.topk_ids.size(), routing.top_k, routing.load.size(), describe(input.logits), gate.top_k, pairs);
  }
  for (const std::int64_t id : routing.topk_ids) {
    if (id >= num_experts) usage_error("the routing has id {}; with num_experts = {} an id is below {}", id, num_experts, num_experts);
  }
}

void check_statistics(const RoutingInput& input, const Gate& gate, const GateStatistics& statistics) {
  routing_internal::check(input, gate);
  const auto num_experts = static_cast<std::size_t>(input.logits.shape[1]);
  if (statistics.load.size() != num_experts || statistics.score_sums.size() != num_experts) {
    usage_error("the statistics are of {} experts, and logits are {}; pass those of this layer", statistics.load.size(),
                describe(input.logits));
  }
}

// How the weights of one token depend on its scores, and those on its logits.
class WeightsGradient {
 public:
  WeightsGradient(const RoutingInput& input, const Gate& gate)
      : gate_(gate),
        over_chosen_(routing_internal::is_softmax_over_chosen(gate)),
        is_sigmoid_(routing_internal::score_of(gate) == Score::sigmoid),
        row_(input, gate),
        d_chosen_(static_cast<std::size_t>(gate.top_k)),
        chosen_(d_chosen_.size()) {}

  // ids, d_weights: [top_k]; d_logits: [num_experts], added to.
  void add(std::int64_t token, const std::int64_t* ids, const float* d_weights, float* d_logits) {
    if (!row_.load(token)) return;
    if (!over_chosen_) row_.score();
    load_chosen(ids);
    if (!differentiate_weights(ids, d_weights)) return;
    float dot = 0;  // softmax: how much all scores shrink when one grows
    for (int k = 0; k < gate_.top_k; ++k) {
      if (ids[k] < 0) continue;
      const float product = d_chosen_[k] * chosen_[k];
      d_logits[ids[k]] += is_sigmoid_ ? product * routing_internal::sigmoid(-row_.logits()[ids[k]]) : product;
      dot += product;
    }
    if (is_sigmoid_ || over_chosen_) return;
    for (std::size_t expert = 0; expert < row_.scores().size(); ++expert) d_logits[expert] -= row_.scores()[expert] * dot;
  }

 private:
  // The scores that the weights are made of: 0 where there is none.
  void load_chosen(const std::int64_t* ids) {
    float highest = routing_internal::kNever;
    for (int k = 0; k < gate_.top_k; ++k) {
      if (ids[k] >= 0) highest = std::max(highest, row_.logits()[ids[k]]);
    }
    for (int k = 0; k < gate_.top_k; ++k) {
      chosen_[k] = ids[k] < 0 ? 0.0F : over_chosen_ ? exp_of_negative(row_.logits()[ids[k]] - highest) : row_.scores()[ids[k]];
    }
  }

  // From weights = scale * chosen / (sum chosen + epsilon), or scale * chosen. False when the weights are 0 whatever the logits.
  bool differentiate_weights(const std::int64_t* ids, const float* d_weights) {
    for (int k = 0; k < gate_.top_k; ++k) d_chosen_[k] = ids[k] < 0 ? 0.0F : gate_.scale * d_weights[k];
    if (!gate_.renormalise) return true;
    const float divisor = std::accumulate(chosen_.begin(), chosen_.end(), 0.0F) + gate_.epsilon;
    if (!(divisor > 0)) return false;
    const float mean = std::inner_product(chosen_.begin(), chosen_.end(), d_chosen_.begin(), 0.0F) / divisor;
    for (int k = 0; k < gate_.top_k; ++k) d_chosen_[k] = (d_chosen_[k] - mean) / divisor;
    return true;
  }

  const Gate& gate_;
  bool over_chosen_;
  bool is_sigmoid_;
  RowScores row_;
  std::vector<float> d_chosen_;
  std::vector<float> chosen_;
};

// 1 / the sum of a token's scores; 0 when all of them underflowed, which then is all the token has.
float inverse_sum(const std::vector<float>& scores) {
  const float sum = std::accumulate(scores.begin(), scores.end(), 0.0F);
  return sum > 0 ? 1.0F / sum : 0.0F;
}

}  // namespace

void add_weights_gradient(const RoutingInput& input, const Gate& gate, const Routing& routing, const ConstTensorView& d_weights,
                          const TensorView& d_logits) {
  check_routing(input, gate, routing);
  const std::int64_t num_tokens = input.logits.shape[0];
  check_matrix("d_weights", d_weights, num_tokens, gate.top_k);
  check_matrix("d_logits", d_logits, num_tokens, input.logits.shape[1]);
  WeightsGradient gradient(input, gate);
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    gradient.add(token, &routing.topk_ids[static_cast<std::size_t>(token * gate.top_k)], d_weights.as<float>() + token * gate.top_k,
                 d_logits.as<float>() + token * input.logits.shape[1]);
  }
}

void GateStatistics::add(const GateStatistics& other) {
  if (other.load.size() != load.size() || other.score_sums.size() != score_sums.size()) {
    usage_error("statistics of {} and {} experts; add those of one layer", load.size(), other.load.size());
  }
  std::transform(load.begin(), load.end(), other.load.begin(), load.begin(), std::plus<>());
  std::transform(score_sums.begin(), score_sums.end(), other.score_sums.begin(), score_sums.begin(), std::plus<>());
  squared_log_sum_exps += other.squared_log_sum_exps;
  num_tokens += other.num_tokens;
}

GateStatistics gate_statistics(const RoutingInput& input, const Gate& gate, const Routing& routing) {
  check_routing(input, gate, routing);
  GateStatistics statistics;
  statistics.load = routing.load;
  statistics.score_sums.assign(routing.load.size(), 0.0);
  RowScores row(input, gate);
  for (std::int64_t token = 0; token < input.logits.shape[0]; ++token) {
    if (!row.load(token)) continue;
    row.score();
    const float inverse = inverse_sum(row.scores());
    for (std::size_t expert = 0; expert < routing.load.size(); ++expert) statistics.score_sums[expert] += row.scores()[expert] * inverse;
    const double log_sum = row.log_sum_exp();
    statistics.squared_log_sum_exps += log_sum * log_sum;
    ++statistics.num_tokens;
  }
  return statistics;
}

double balance_loss(const GateStatistics& statistics, double alpha) {
  const auto pairs = static_cast<double>(std::accumulate(statistics.load.begin(), statistics.load.end(), std::int64_t{0}));
  if (pairs == 0 || statistics.num_tokens == 0) return 0;
  double sum = 0;
  for (std::size_t expert = 0; expert < statistics.load.size(); ++expert) {
    sum += static_cast<double>(statistics.load[expert]) * statistics.score_sums[expert];
  }
  return alpha * static_cast<double>(statistics.load.size()) / pairs * sum / static_cast<double>(statistics.num_tokens);
}

double z_loss(const GateStatistics& statistics, double alpha) {
  return statistics.num_tokens == 0 ? 0 : alpha * statistics.squared_log_sum_exps / static_cast<double>(statistics.num_tokens);
}

void add_balance_gradient(const RoutingInput& input, const Gate& gate, const GateStatistics& statistics, double alpha,
                          const TensorView& d_logits) {
  check_statistics(input, gate, statistics);
  check_matrix("d_logits", d_logits, input.logits.shape[0], input.logits.shape[1]);
  const auto pairs = static_cast<double>(std::accumulate(statistics.load.begin(), statistics.load.end(), std::int64_t{0}));
  if (pairs == 0 || statistics.num_tokens == 0) return;
  const auto num_experts = statistics.load.size();
  std::vector<float> d_scores(num_experts);  // of every token: the loads are constants
  for (std::size_t expert = 0; expert < num_experts; ++expert) {
    const double share = static_cast<double>(statistics.load[expert]) / pairs;
    d_scores[expert] = static_cast<float>(alpha * static_cast<double>(num_experts) * share / static_cast<double>(statistics.num_tokens));
  }
  const bool is_sigmoid = routing_internal::score_of(gate) == Score::sigmoid;
  RowScores row(input, gate);
  for (std::int64_t token = 0; token < input.logits.shape[0]; ++token) {
    if (!row.load(token)) continue;
    row.score();
    const float inverse = inverse_sum(row.scores());
    const float mean = std::inner_product(row.scores().begin(), row.scores().end(), d_scores.begin(), 0.0F) * inverse;
    float* out = d_logits.as<float>() + token * static_cast<std::int64_t>(num_experts);
    for (std::size_t expert = 0; expert < num_experts; ++expert) {
      const float d = row.scores()[expert] * inverse * (d_scores[expert] - mean);
      out[expert] += is_sigmoid ? d * routing_internal::sigmoid(-row.logits()[expert]) : d;
    }
  }
}

void add_z_gradient(const RoutingInput& input, const Gate& gate, const GateStatistics& statistics, double alpha,
                    const TensorView& d_logits) {
  check_statistics(input, gate, statistics);
  check_matrix("d_logits", d_logits, input.logits.shape[0], input.logits.shape[1]);
  if (statistics.num_tokens == 0) return;
  RowScores row(input, gate);
  std::vector<float> probabilities;
  for (std::int64_t token = 0; token < input.logits.shape[0]; ++token) {
    if (!row.load(token)) continue;
    row.softmax(probabilities);
    const auto factor = static_cast<float>(2 * alpha * row.log_sum_exp() / static_cast<double>(statistics.num_tokens));
    float* out = d_logits.as<float>() + token * input.logits.shape[1];
    for (std::size_t expert = 0; expert < probabilities.size(); ++expert) out[expert] += factor * probabilities[expert];
  }
}

void update_gate_bias(std::span<float> bias, std::span<const std::int64_t> load, float gamma) {
  if (bias.size() != load.size()) usage_error("bias has {} entries and load {}; both are [experts]", bias.size(), load.size());
  if (!std::isfinite(gamma)) usage_error("gamma = {}; it is finite", gamma);
  const std::int64_t sum = std::accumulate(load.begin(), load.end(), std::int64_t{0});
  for (std::size_t expert = 0; expert < load.size(); ++expert) {
    const double excess = static_cast<double>(load[expert]) * static_cast<double>(load.size()) - static_cast<double>(sum);
    if (excess > 0) bias[expert] -= gamma;
    if (excess < 0) bias[expert] += gamma;
  }
}

}  // namespace tokenyard
