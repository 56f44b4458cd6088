// The gated feed-forward, a block of one expert's rows at a time: w13, activation, w2, and the same backwards.

#include <algorithm>
#include <cmath>

#include "core/usage.h"
#include "experts/row_block.h"
#include "experts/sgemm.h"

namespace tokenyard {

using namespace experts_internal;  // NOLINT(google-build-using-namespace): this file is a part of it

namespace {

float sigmoid(float x) { return 1.0F / (1.0F + std::exp(-x)); }

float activated(const Activation& a, float gate, float up) {
  if (a.kind == ActivationKind::silu) return gate * sigmoid(gate) * up;
  const float g = std::min(gate, a.limit);
  const float u = std::clamp(up, -a.limit, a.limit);
  return g * sigmoid(a.alpha * g) * (u + 1.0F);
}

struct GateUp {
  float gate = 0;
  float up = 0;
};

// d (gate, up), given d of what activated() returned. Where a clamp holds, nothing passes.
GateUp activation_gradient(const Activation& a, GateUp at, float d) {
  const bool is_silu = a.kind == ActivationKind::silu;
  const float g = is_silu ? at.gate : std::min(at.gate, a.limit);
  const float u = is_silu ? at.up : std::clamp(at.up, -a.limit, a.limit) + 1.0F;
  const float alpha = is_silu ? 1.0F : a.alpha;
  const float s = sigmoid(alpha * g);
  GateUp gradient = {d * u * s * (1.0F + alpha * g * (1.0F - s)), d * g * s};
  if (!is_silu && at.gate > a.limit) gradient.gate = 0;
  if (!is_silu && (at.up > a.limit || at.up < -a.limit)) gradient.up = 0;
  return gradient;
}

ExpertSizes check_weights(const ConstTensorView& x, const RowGroups& groups, const ExpertWeights& weights) {
  check_input(x, groups);
  const ExpertSizes sizes = {std::ssize(groups.counts), weights.w13.ndim == 4 ? weights.w13.shape[2] : 0, x.shape[1]};
  check_products(weights, sizes);
  if (weights.w13_bias) check_dense("w13_bias", weights.w13_bias, {sizes.experts, 2, sizes.width});
  if (weights.w2_bias) check_dense("w2_bias", weights.w2_bias, {sizes.experts, sizes.hidden});
  return sizes;
}

void check_gradients(const ExpertSizes& s, const ExpertWeights& weights, const ExpertGradients& gradients) {
  check_float32("gradients.w13", gradients.w13, {s.experts, 2, s.width, s.hidden});
  check_float32("gradients.w2", gradients.w2, {s.experts, s.hidden, s.width});
  if (weights.w13_bias) check_float32("gradients.w13_bias", gradients.w13_bias, {s.experts, 2, s.width});
  if (weights.w2_bias) check_float32("gradients.w2_bias", gradients.w2_bias, {s.experts, s.hidden});
}

void add_bias(const float* bias, std::int64_t rows, std::int64_t columns, float* values) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t c = 0; c < columns; ++c) values[row * columns + c] += bias[c];
  }
}

void add_column_sums(const float* values, std::int64_t rows, std::int64_t columns, float* sums) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t c = 0; c < columns; ++c) sums[c] += values[row * columns + c];
  }
}

// [rows, 2I] -> [rows, I]
void activate(const Activation& activation, const float* gate_up, std::int64_t rows, std::int64_t width, std::vector<float>& out) {
  out.resize(static_cast<std::size_t>(rows * width));
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* gate = gate_up + row * 2 * width;
    for (std::int64_t i = 0; i < width; ++i) out[row * width + i] = activated(activation, gate[i], gate[width + i]);
  }
}

// Of a block, at most; the next call on this thread has it again.
struct BackwardScratch {
  std::vector<float> x, dy, act, d_act, d_gate_up, dx;
};

// The backward pass of one call: what its blocks share.
class Backward {
 public:
  Backward(const ExpertBackwardInput& input, const RowGroups& groups, const ExpertWeights& weights, const ExpertSizes& sizes)
      : input_(input), groups_(groups), sizes_(sizes), w13_(weights.w13), w2_(weights.w2) {}

  void block(std::int64_t group, Places places, const Activation& activation, const TensorView& dx, const ExpertGradients& gradients) {
    const auto [experts, width, hidden] = sizes_;
    const std::int64_t rows = places.count;
    const float* gate_up = input_.saved->gate_up.data() + places.begin * 2 * width;
    const float* dy = read_places(input_.dy, places, dy_scratch_);
    d_act_.resize(static_cast<std::size_t>(rows * width));
    multiply({.m = rows, .n = width, .k = hidden, .a = {dy, hidden}, .b = {w2_.of(group), width}, .c = d_act_.data(), .c_stride = width});
    activate(activation, gate_up, rows, width, act_);
    float* d_w2 = gradients.w2.as<float>() + group * hidden * width;
    multiply({.m = hidden,
              .n = width,
              .k = rows,
              .a = {dy, hidden, true},
              .b = {act_.data(), width},
              .accumulate = true,
              .c = d_w2,
              .c_stride = width});
    if (gradients.w2_bias) add_column_sums(dy, rows, hidden, gradients.w2_bias.as<float>() + group * hidden);
    differentiate(activation, gate_up, rows);
    if (gradients.w13_bias) add_column_sums(d_gate_up_.data(), rows, 2 * width, gradients.w13_bias.as<float>() + group * 2 * width);
    const float* x = read_rows(input_.x, groups_, places, x_scratch_);
    float* d_w13 = gradients.w13.as<float>() + group * 2 * width * hidden;
    multiply({.m = 2 * width,
              .n = hidden,
              .k = rows,
              .a = {d_gate_up_.data(), 2 * width, true},
              .b = {x, hidden},
              .accumulate = true,
              .c = d_w13,
              .c_stride = hidden});
    dx_.resize(static_cast<std::size_t>(rows * hidden));
    multiply({.m = rows,
              .n = hidden,
              .k = 2 * width,
              .a = {d_gate_up_.data(), 2 * width},
              .b = {w13_.of(group), hidden},
              .c = dx_.data(),
              .c_stride = hidden});
    write_places(dx_, places, dx);
  }

 private:
  void differentiate(const Activation& activation, const float* gate_up, std::int64_t rows) {
    const std::int64_t width = sizes_.width;
    d_gate_up_.resize(static_cast<std::size_t>(rows * 2 * width));
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t i = 0; i < width; ++i) {
        const std::int64_t gate = row * 2 * width + i;
        const GateUp d = activation_gradient(activation, {gate_up[gate], gate_up[gate + width]}, d_act_[row * width + i]);
        d_gate_up_[gate] = d.gate;
        d_gate_up_[gate + width] = d.up;
      }
    }
  }

  const ExpertBackwardInput& input_;
  const RowGroups& groups_;
  ExpertSizes sizes_;
  GroupTensor w13_, w2_;
  static BackwardScratch& scratch() {
    thread_local BackwardScratch of_thread;
    return of_thread;
  }
  std::vector<float>&x_scratch_ = scratch().x, &dy_scratch_ = scratch().dy, &act_ = scratch().act, &d_act_ = scratch().d_act,
  &d_gate_up_ = scratch().d_gate_up, &dx_ = scratch().dx;
};

}  // namespace

void experts_forward(const ConstTensorView& x, const RowGroups& groups, const ExpertWeights& weights, const Activation& activation,
                     const TensorView& y, ExpertActivations* saved) {
  const auto [experts, width, hidden] = check_weights(x, groups, weights);
  check_rows("y", y, groups.places, hidden);
  if (saved != nullptr) {
    check_differentiable(weights);
    saved->gate_up.assign(static_cast<std::size_t>(groups.places * 2 * width), 0.0F);
  }
  GroupTensor w13(weights.w13, weights.w13_scale), w2(weights.w2, weights.w2_scale), w13_bias(weights.w13_bias), w2_bias(weights.w2_bias);
  thread_local std::vector<float> scratch, block, act, result;  // at most a block's: the next call has them again
  for_each_block(groups, [&, width = width, hidden = hidden](std::int64_t group, Places places) {
    const std::int64_t rows = places.count;
    if (saved == nullptr) block.resize(static_cast<std::size_t>(rows * 2 * width));
    float* gate_up = saved == nullptr ? block.data() : saved->gate_up.data() + places.begin * 2 * width;
    multiply({.m = rows,
              .n = 2 * width,
              .k = hidden,
              .a = {read_rows(x, groups, places, scratch), hidden},
              .b = {w13.of(group), hidden, true},
              .c = gate_up,
              .c_stride = 2 * width});
    if (w13_bias) add_bias(w13_bias.of(group), rows, 2 * width, gate_up);
    activate(activation, gate_up, rows, width, act);
    result.resize(static_cast<std::size_t>(rows * hidden));
    multiply({.m = rows,
              .n = hidden,
              .k = width,
              .a = {act.data(), width},
              .b = {w2.of(group), width, true},
              .c = result.data(),
              .c_stride = hidden});
    if (w2_bias) add_bias(w2_bias.of(group), rows, hidden, result.data());
    write_places(result, places, y);
  });
}

void experts_backward(const ExpertBackwardInput& input, const RowGroups& groups, const ExpertWeights& weights, const Activation& activation,
                      const TensorView& dx, const ExpertGradients& gradients) {
  const ExpertSizes sizes = check_weights(input.x, groups, weights);
  check_differentiable(weights);
  check_rows("dy", input.dy, groups.places, sizes.hidden);
  check_rows("dx", dx, groups.places, sizes.hidden);
  check_gradients(sizes, weights, gradients);
  if (input.saved == nullptr || std::ssize(input.saved->gate_up) != groups.places * 2 * sizes.width) {
    usage_error("saved has {} values; expected {}: pass what experts_forward saved for these rows",
                input.saved == nullptr ? 0 : input.saved->gate_up.size(), groups.places * 2 * sizes.width);
  }
  Backward backward(input, groups, weights, sizes);
  for_each_block(groups, [&](std::int64_t group, Places places) { backward.block(group, places, activation, dx, gradients); });
}

}  // namespace tokenyard
