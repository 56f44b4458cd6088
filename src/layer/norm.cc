#include "tokenyard/norm.h"

#include <algorithm>
#include <cmath>

#include "core/usage.h"
#include "experts/row_block.h"
#include "layer/buffer.h"
#include "layer/norm_arithmetic.h"
#include "layer/norm_checks.h"

namespace tokenyard {

using namespace layer_internal;  // NOLINT(google-build-using-namespace): this file is a part of it
using experts_internal::from_float;
using experts_internal::to_float;

namespace {

using Floats = std::vector<float>;

void read(const ConstTensorView& view, std::int64_t row, Floats& to) { to_float(view.row(row), view.dtype, std::ssize(to), to.data()); }
void write(const Floats& values, const TensorView& view, std::int64_t row) {
  from_float(values.data(), view.dtype, std::ssize(values), view.row(row));
}

// As float32; zeros where there is none.
Floats vector_of(const ConstTensorView& view, std::int64_t elements) {
  Floats values(static_cast<std::size_t>(elements), 0.0F);
  if (view) to_float(static_cast<const std::byte*>(view.data), view.dtype, elements, values.data());
  return values;
}

float inverse_root_mean_square(const Floats& row, float epsilon) {
  double sum = 0;
  for (const float value : row) sum += static_cast<double>(value) * value;
  return static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(row.size()) + epsilon));
}

// Runs what this rank does before its call, and tells the others when it will not make it.
template <class Before>
void before_call(Collectives& collectives, Before&& before) {
  try {
    before();
  } catch (const UsageError& error) {
    collectives.abandon({.kind = FailureKind::aborted, .peer = collectives.world().rank(), .detail = error.what()});
    throw;
  }
}

}  // namespace

std::vector<std::int64_t> slice_counts(std::int64_t tokens, int ranks) {
  if (tokens < 0 || ranks < 1) usage_error("{} tokens on {} ranks; expected at least 0 and 1", tokens, ranks);
  std::vector<std::int64_t> counts(static_cast<std::size_t>(ranks), tokens / ranks);
  for (std::int64_t rank = 0; rank < tokens % ranks; ++rank) ++counts[static_cast<std::size_t>(rank)];
  return counts;
}

void residual_norm(const ResidualInput& input, const RmsNorm& norm, const NormOutput& output) {
  check_norm(input, norm, output);
  const std::int64_t hidden_size = input.x.shape[1];
  const Floats weight = vector_of(norm.weight, hidden_size), bias = vector_of(input.bias, hidden_size);
  Floats sum(weight.size()), term(weight.size());
  for (std::int64_t t = 0; t < input.x.shape[0]; ++t) {
    read(input.x, t, sum);
    for (std::size_t h = 0; input.bias && h < sum.size(); ++h) sum[h] += bias[h];
    if (input.residual) {
      read(input.residual, t, term);
      std::transform(sum.begin(), sum.end(), term.begin(), sum.begin(), std::plus<>());
    }
    write(sum, output.residual, t);
    read(output.residual, t, sum);  // rounded: backward has no other
    const float inverse = inverse_root_mean_square(sum, norm.epsilon);
    if (output.inverse) output.inverse.as<float>()[t] = inverse;
    for (std::size_t h = 0; h < sum.size(); ++h) sum[h] = normed(sum[h], inverse, weight[h]);
    write(sum, output.out, t);
  }
}

void reduce_scatter_norm(Collectives& collectives, const ResidualInput& input, const RmsNorm& norm, const NormOutput& output) {
  const ResidualInput sums = {output.out, input.residual, input.bias};
  before_call(collectives, [&] { check_norm(sums, norm, output); });
  collectives.reduce_scatter_v(input.x, slice_counts(rows_in("x", input.x), collectives.world().size()), output.out);
  residual_norm(sums, norm, output);
}

void norm_all_gather(Collectives& collectives, const ResidualInput& input, const RmsNorm& norm, const NormOutput& output) {
  const SliceOf slice(collectives.world(), rows_in("output.out", output.out));
  const TensorView mine = rows_of(output.out, slice.begin, slice.count);
  before_call(collectives, [&] { residual_norm(input, norm, {output.residual, mine, output.inverse}); });
  collectives.all_gather_v(mine, slice.counts, output.out);
}

void residual_norm_backward(const NormGradient& input, const RmsNorm& norm, const TensorView& d_x, const TensorView& d_weight) {
  check_norm_backward(input, norm, d_x, d_weight);
  const Floats weight = vector_of(norm.weight, input.residual.shape[1]);
  Floats r(weight.size()), g(weight.size()), d(weight.size());
  for (std::int64_t t = 0; t < input.residual.shape[0]; ++t) {
    read(input.residual, t, r);
    read(input.d_out, t, g);
    std::fill(d.begin(), d.end(), 0.0F);
    if (input.d_residual) read(input.d_residual, t, d);
    const float inverse = input.inverse ? input.inverse.as<float>()[t] : inverse_root_mean_square(r, norm.epsilon);
    double projection = 0;  // of weight * d_out on the normalised row
    for (std::size_t h = 0; h < r.size(); ++h) {
      if (d_weight) d_weight.as<float>()[h] += g[h] * r[h] * inverse;
      g[h] *= weight[h];
      projection += static_cast<double>(g[h]) * r[h];
    }
    const auto mean = static_cast<float>(projection * inverse * inverse / static_cast<double>(r.size()));
    for (std::size_t h = 0; h < r.size(); ++h) d[h] += norm_gradient(g[h], r[h], inverse, mean);
    write(d, d_x, t);
  }
}

void reduce_scatter_norm_backward(Collectives& collectives, const NormGradient& input, const RmsNorm& norm, const NormOutput& d,
                                  const TensorView& d_weight) {
  before_call(collectives, [&] { residual_norm_backward(input, norm, d.residual, d_weight); });
  collectives.all_gather_v(d.residual, slice_counts(rows_in("d.out", d.out), collectives.world().size()), d.out);
}

void norm_all_gather_backward(Collectives& collectives, const NormGradient& input, const RmsNorm& norm, const TensorView& d_x,
                              const TensorView& d_weight) {
  const SliceOf slice(collectives.world(), rows_in("d_out", input.d_out));
  Buffer memory;
  const TensorView mine = memory.view(input.d_out.dtype, slice.count, input.d_out.shape[1]);
  const NormGradient sums = {input.residual, input.d_residual, mine, input.inverse};
  before_call(collectives, [&] { check_norm_backward(sums, norm, d_x, d_weight); });
  collectives.reduce_scatter_v(input.d_out, slice.counts, mine);
  residual_norm_backward(sums, norm, d_x, d_weight);
}

}  // namespace tokenyard
