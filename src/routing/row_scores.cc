#include "routing/row_scores.h"

#include <algorithm>
#include <cmath>

#include "routing/arithmetic.h"

namespace tokenyard::routing_internal {
namespace {

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

}  // namespace

RowScores::RowScores(const RoutingInput& input, const Gate& gate)
    : input_(input),
      score_(score_of(gate)),
      highest_(kNever),
      logits_(static_cast<std::size_t>(input.logits.shape[1])),
      scores_(logits_.size()) {}

bool RowScores::load(std::int64_t token) {
  if (input_.mask && *input_.mask.row(token) == std::byte{0}) return false;
  ConstTensorView row = input_.logits;
  row.data = input_.logits.row(token);
  highest_ = kNever;
  for (std::size_t expert = 0; expert < logits_.size(); ++expert) {
    const float logit = read_float(row, static_cast<std::int64_t>(expert) * row.strides[1]);
    logits_[expert] = std::isfinite(logit) ? logit : kNever;
    highest_ = std::max(highest_, logits_[expert]);
  }
  return highest_ != kNever;
}

void RowScores::score() {
  if (score_ == Score::sigmoid) {
    std::transform(logits_.begin(), logits_.end(), scores_.begin(), sigmoid);
  } else {
    softmax(scores_);
  }
}

void RowScores::softmax(std::vector<float>& probabilities) const {
  probabilities.resize(logits_.size());
  float sum = 0;
  for (std::size_t expert = 0; expert < logits_.size(); ++expert) {
    probabilities[expert] = exp_of_negative(logits_[expert] - highest_);
    sum += probabilities[expert];
  }
  for (float& probability : probabilities) probability /= sum;
}

double RowScores::log_sum_exp() const {
  double sum = 0;
  for (const float logit : logits_) sum += exp_of_negative(logit - highest_);
  return highest_ + std::log(sum);
}

}  // namespace tokenyard::routing_internal
