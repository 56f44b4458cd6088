// A feed-forward that every token goes through: whole, or cut over the ranks of dense_tp. On CPUs; those on GPUs have an engine.

#include <cmath>

#include "core/usage.h"
#include "experts/row_block.h"
#include "layer/moe_checks.h"
#include "layer/moe_engine.h"
#include "layer/steps.h"

namespace tokenyard {

using namespace layer_internal;  // NOLINT(google-build-using-namespace): this file is a part of it
using experts_internal::from_float;
using experts_internal::to_float;

namespace {

RowGroups one_group(std::int64_t rows) { return {.places = rows, .begins = {0}, .counts = {rows}, .rows = {}}; }

using Floats = std::vector<float>;

Floats& read(const ConstTensorView& view, std::int64_t row, Floats& to) {
  to.resize(static_cast<std::size_t>(view.shape[1]));
  to_float(view.row(row), view.dtype, view.shape[1], to.data());
  return to;
}

void write_scaled(Floats& values, float factor, const TensorView& to, std::int64_t row) {
  for (float& value : values) value *= factor;
  from_float(values.data(), to.dtype, to.shape[1], to.row(row));
}

float dot(const Floats& a, const Floats& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return static_cast<float>(sum);
}

// Two matrices of one shape and dtype.
void check_alike(const ConstTensorView& x, const ConstTensorView& other, const char* what, std::int64_t hidden_size) {
  const std::int64_t rows = x.ndim == 2 ? x.shape[0] : 0;
  experts_internal::check_rows("x", x, rows, hidden_size);
  experts_internal::check_rows(what, other, rows, hidden_size);
  if (other.dtype != x.dtype) usage_error("x is {} and {} is {}; use one dtype", describe(x), what, describe(other));
}

}  // namespace

DenseActivations::DenseActivations() : step_(std::make_unique<DenseStep>()) {}
DenseActivations::~DenseActivations() = default;
DenseActivations::DenseActivations(DenseActivations&&) noexcept = default;
DenseActivations& DenseActivations::operator=(DenseActivations&&) noexcept = default;

DenseLayer::DenseLayer(std::shared_ptr<ExpertGroup> group, const DenseWeights& weights, const Activation& activation)
    : group_(std::move(group)), weights_(weights), activation_(activation) {
  check_dense(weights);
  if (group_ && group_->options().device == Device::cuda) on_gpu_ = make_cuda_dense(group_, weights, activation);
}

void DenseLayer::check_gradients(const DenseGradients& gradients) const {
  if (on_gpu_) return on_gpu_->check_gradients(gradients);
  layer_internal::check_gradients(weights_.weights, gradients.weights);
  if (gradients.gate) experts_internal::check_float32("gradients.gate", gradients.gate, {1, weights_.weights.w13.shape[3]});
}

template <class Check>
void DenseLayer::checked(Check&& check) {
  try {
    check();
  } catch (const UsageError& error) {
    if (group_ && group_->dense() != nullptr) {
      group_->dense()->abandon({.kind = FailureKind::aborted, .peer = group_->dense()->world().rank(), .detail = error.what()});
    }
    throw;
  }
}

void DenseLayer::forward(const ConstTensorView& x, const TensorView& out, DenseActivations* saved, void* stream) {
  if (on_gpu_) return on_gpu_->forward(x, out, saved, stream);
  checked([&] { check_alike(x, out, "out", weights_.weights.w13.shape[3]); });
  DenseStep& step = saved == nullptr ? scratch_.step() : saved->step();
  ExpertActivations* activations = saved == nullptr ? nullptr : &step.activations;
  Collectives* const ranks = group_ ? group_->dense() : nullptr;
  const TensorView y = weights_.gate ? step.y.view(x.dtype, x.shape[0], x.shape[1]) : out;
  if (ranks == nullptr) {
    experts_forward(x, one_group(x.shape[0]), weights_.weights, activation_, y, activations);
  } else {
    step.counts.gather(*ranks, x.shape[0]);
    const TensorView all = gather_rows(*ranks, step.counts, x, step.rows);
    const TensorView partial = step.partial.view(x.dtype, all.shape[0], all.shape[1]);
    experts_forward(all, one_group(all.shape[0]), weights_.weights, activation_, partial, activations);
    ranks->reduce_scatter_v(partial, step.counts.counts(), y);
  }
  if (!weights_.gate) return;
  step.scores.resize(static_cast<std::size_t>(x.shape[0]));
  Floats gate, row;
  read(weights_.gate, 0, gate);
  for (std::int64_t t = 0; t < x.shape[0]; ++t) {
    step.scores[t] = 1.0F / (1.0F + std::exp(-dot(read(x, t, row), gate)));
    write_scaled(read(y, t, row), step.scores[t], out, t);
  }
}

void DenseLayer::backward(const ConstTensorView& x, const ConstTensorView& d_out, const DenseActivations& saved, const TensorView& d_x,
                          const DenseGradients& gradients, void* stream) {
  if (on_gpu_) return on_gpu_->backward({x, d_out, d_x, gradients, stream}, saved);
  DenseStep& step = saved.step();
  checked([&] {
    check_alike(x, d_out, "d_out", weights_.weights.w13.shape[3]);
    check_alike(x, d_x, "d_x", weights_.weights.w13.shape[3]);
    check_gradients(gradients);
  });
  Collectives* const ranks = group_ ? group_->dense() : nullptr;
  ConstTensorView d_y = d_out;
  if (weights_.gate) {
    const TensorView scaled = step.d_y.view(x.dtype, x.shape[0], x.shape[1]);
    Floats row;
    for (std::int64_t t = 0; t < x.shape[0]; ++t) write_scaled(read(d_out, t, row), step.scores[t], scaled, t);
    d_y = scaled;
  }
  if (ranks == nullptr) {
    experts_backward({.x = x, .dy = d_y, .saved = &step.activations}, one_group(x.shape[0]), weights_.weights, activation_, d_x,
                     gradients.weights);
  } else {
    const TensorView all = step.rows.view(x.dtype, step.counts.total(), x.shape[1]);
    const TensorView d_partial = gather_rows(*ranks, step.counts, d_y, step.d_partial);
    const TensorView d_all = step.partial.view(x.dtype, all.shape[0], all.shape[1]);
    experts_backward({.x = all, .dy = d_partial, .saved = &step.activations}, one_group(all.shape[0]), weights_.weights, activation_, d_all,
                     gradients.weights);
    ranks->reduce_scatter_v(d_all, step.counts.counts(), d_x);
  }
  if (!weights_.gate) return;
  Floats gate, d_row, row;
  read(weights_.gate, 0, gate);
  const ConstTensorView y = step.y.view(x.dtype, x.shape[0], x.shape[1]);
  for (std::int64_t t = 0; t < x.shape[0]; ++t) {
    const float score = step.scores[t];
    const float d_logit = dot(read(d_out, t, d_row), read(y, t, row)) * score * (1.0F - score);
    read(x, t, row);
    read(d_x, t, d_row);
    for (std::size_t h = 0; h < row.size(); ++h) {
      d_row[h] += d_logit * gate[h];
      if (gradients.gate) gradients.gate.as<float>()[h] += d_logit * row[h];
    }
    from_float(d_row.data(), d_x.dtype, d_x.shape[1], d_x.row(t));
  }
}

}  // namespace tokenyard
