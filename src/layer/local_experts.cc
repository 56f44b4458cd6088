#include "layer/local_experts.h"

#include <cstring>

#include "core/usage.h"
#include "experts/row_block.h"

namespace tokenyard::layer_internal {
namespace {

void fill_zero(const TensorView& view) {
  if (view.num_elements() > 0) std::memset(view.data, 0, static_cast<std::size_t>(view.num_elements() * size_of(view.dtype)));
}

FoldInput fold_input(const ExpertRows& input, const ConstTensorView& places) { return {places, input.local_ids, input.row_weights}; }

}  // namespace

void check_gradients(const ExpertWeights& weights, const ExpertGradients& gradients) {
  const auto check = [](const char* what, const ConstTensorView& weight, const ConstTensorView& gradient) {
    if (!weight) return;
    const bool fits = gradient.ndim == weight.ndim && gradient.shape == weight.shape && gradient.dtype == Dtype::float32;
    if (!fits)
      usage_error("the gradient of {} is {}; expected float32 as {}", what, gradient ? describe(gradient) : "absent", describe(weight));
  };
  check("w13", weights.w13, gradients.w13);
  check("w2", weights.w2, gradients.w2);
  check("w13_bias", weights.w13_bias, gradients.w13_bias);
  check("w2_bias", weights.w2_bias, gradients.w2_bias);
}

void LocalExperts::check_differentiable() const { experts_internal::check_differentiable(weights_); }

void LocalExperts::forward(const ExpertRows& input, const TensorView& partial, ExpertStep& step, bool is_saved) const {
  if (num_local_experts_ == 0) return fill_zero(partial);
  step.groups = RowGroups::gathered(input.local_ids, num_local_experts_);
  const TensorView y = step.places.view(input.rows.dtype, step.groups.places, input.rows.shape[1]);
  experts_forward(input.rows, step.groups, weights_, activation_, y, is_saved ? &step.activations : nullptr);
  unpermute(fold_input(input, y), step.groups, partial);
}

void LocalExperts::backward(const ExpertRows& input, const ConstTensorView& d_partial, ExpertStep& step, const ExpertRowsGradient& d,
                            const ExpertGradients& gradients) {
  if (num_local_experts_ == 0) {
    fill_zero(d.rows);
    return fill_zero(d.row_weights);
  }
  const std::int64_t places = step.groups.places;
  const std::int64_t hidden_size = input.rows.shape[1];
  const ConstTensorView y = step.places.view(input.rows.dtype, places, hidden_size);
  const TensorView d_y = d_y_.view(input.rows.dtype, places, hidden_size);
  const TensorView d_x = d_x_.view(input.rows.dtype, places, hidden_size);
  unpermute_backward(fold_input(input, y), step.groups, d_partial, d_y, d.row_weights);
  experts_backward({.x = input.rows, .dy = d_y, .saved = &step.activations}, step.groups, weights_, activation_, d_x, gradients);
  unpermute({d_x, input.local_ids, {}}, step.groups, d.rows);
}

}  // namespace tokenyard::layer_internal
