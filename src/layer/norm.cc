#include "tokenyard/norm.h"

#include <algorithm>
#include <cmath>

#include "core/usage.h"
#include "experts/row_block.h"
#include "layer/buffer.h"

namespace tokenyard {

using experts_internal::check_rows;
using experts_internal::from_float;
using experts_internal::to_float;
using layer_internal::Buffer;
using layer_internal::rows_of;

namespace {

using Floats = std::vector<float>;

void read(const ConstTensorView& view, std::int64_t row, Floats& to) { to_float(view.row(row), view.dtype, std::ssize(to), to.data()); }
void write(const Floats& values, const TensorView& view, std::int64_t row) {
  from_float(values.data(), view.dtype, std::ssize(values), view.row(row));
}

Floats vector_of(const char* what, const ConstTensorView& view, std::int64_t elements) {
  Floats values(static_cast<std::size_t>(elements), 0.0F);
  if (!view) return values;
  if (view.ndim != 1 || view.shape[0] != elements || view.strides[0] != 1) {
    usage_error("{} is {}; expected [{}], dense", what, describe(view), elements);
  }
  to_float(static_cast<const std::byte*>(view.data), view.dtype, elements, values.data());
  return values;
}

Floats weight_of(const RmsNorm& norm, std::int64_t elements) {
  if (!norm.weight) usage_error("the norm has no weight; expected [{}], ones for none", elements);
  return vector_of("norm.weight", norm.weight, elements);
}

float inverse_root_mean_square(const Floats& row, float epsilon) {
  double sum = 0;
  for (const float value : row) sum += static_cast<double>(value) * value;
  return static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(row.size()) + epsilon));
}

// This rank's slice of T tokens.
struct SliceOf {
  std::vector<std::int64_t> counts;
  std::int64_t begin = 0;
  std::int64_t count = 0;
  SliceOf(const Collectives& collectives, std::int64_t tokens) : counts(slice_counts(tokens, collectives.world().size())) {
    for (int rank = 0; rank < collectives.world().rank(); ++rank) begin += counts[static_cast<std::size_t>(rank)];
    count = counts[static_cast<std::size_t>(collectives.world().rank())];
  }
};

std::int64_t rows_in(const ConstTensorView& view, const char* what) {
  if (view.ndim != 2) usage_error("{} is {}; expected [tokens, hidden_size]", what, view ? describe(view) : "absent");
  return view.shape[0];
}

}  // namespace

std::vector<std::int64_t> slice_counts(std::int64_t tokens, int ranks) {
  if (tokens < 0 || ranks < 1) usage_error("{} tokens on {} ranks; expected at least 0 and 1", tokens, ranks);
  std::vector<std::int64_t> counts(static_cast<std::size_t>(ranks), tokens / ranks);
  for (std::int64_t rank = 0; rank < tokens % ranks; ++rank) ++counts[static_cast<std::size_t>(rank)];
  return counts;
}

void residual_norm(const ResidualInput& input, const RmsNorm& norm, const NormOutput& output) {
  const std::int64_t tokens = rows_in(input.x, "x");
  const std::int64_t hidden_size = input.x.shape[1];
  check_rows("x", input.x, tokens, hidden_size);
  if (input.residual) check_rows("residual", input.residual, tokens, hidden_size);
  check_rows("output.residual", output.residual, tokens, hidden_size);
  check_rows("output.out", output.out, tokens, hidden_size);
  const Floats weight = weight_of(norm, hidden_size);
  const Floats bias = vector_of("bias", input.bias, hidden_size);
  Floats sum(weight.size()), term(weight.size());
  for (std::int64_t t = 0; t < tokens; ++t) {
    read(input.x, t, sum);
    for (std::size_t h = 0; input.bias && h < sum.size(); ++h) sum[h] += bias[h];
    if (input.residual) {
      read(input.residual, t, term);
      std::transform(sum.begin(), sum.end(), term.begin(), sum.begin(), std::plus<>());
    }
    write(sum, output.residual, t);
    read(output.residual, t, sum);  // rounded: backward has no other
    const float inverse = inverse_root_mean_square(sum, norm.epsilon);
    for (std::size_t h = 0; h < sum.size(); ++h) sum[h] = sum[h] * inverse * weight[h];
    write(sum, output.out, t);
  }
}

void reduce_scatter_norm(Collectives& collectives, const ResidualInput& input, const RmsNorm& norm, const NormOutput& output) {
  const SliceOf slice(collectives, rows_in(input.x, "x"));
  Buffer memory;
  const TensorView reduced = memory.view(input.x.dtype, slice.count, input.x.shape[1]);
  collectives.reduce_scatter_v(input.x, slice.counts, reduced);
  residual_norm({reduced, input.residual, input.bias}, norm, output);
}

void norm_all_gather(Collectives& collectives, const ResidualInput& input, const RmsNorm& norm, const NormOutput& output) {
  const SliceOf slice(collectives, rows_in(output.out, "output.out"));
  const TensorView mine = rows_of(output.out, slice.begin, slice.count);
  residual_norm(input, norm, {output.residual, mine});
  collectives.all_gather_v(mine, slice.counts, output.out);
}

void residual_norm_backward(const NormGradient& input, const RmsNorm& norm, const TensorView& d_x, const TensorView& d_weight) {
  const std::int64_t tokens = rows_in(input.residual, "residual");
  const std::int64_t hidden_size = input.residual.shape[1];
  for (const auto& [what, view] : {std::pair{"residual", input.residual}, {"d_out", input.d_out}, {"d_x", ConstTensorView(d_x)}}) {
    check_rows(what, view, tokens, hidden_size);
  }
  if (input.d_residual) check_rows("d_residual", input.d_residual, tokens, hidden_size);
  if (d_weight) experts_internal::check_float32("d_weight", d_weight, {hidden_size});
  const Floats weight = weight_of(norm, hidden_size);
  Floats r(weight.size()), g(weight.size()), d(weight.size());
  for (std::int64_t t = 0; t < tokens; ++t) {
    read(input.residual, t, r);
    read(input.d_out, t, g);
    std::fill(d.begin(), d.end(), 0.0F);
    if (input.d_residual) read(input.d_residual, t, d);
    const float inverse = inverse_root_mean_square(r, norm.epsilon);
    double projection = 0;  // of weight * d_out on the normalised row
    for (std::size_t h = 0; h < r.size(); ++h) {
      if (d_weight) d_weight.as<float>()[h] += g[h] * r[h] * inverse;
      g[h] *= weight[h];
      projection += static_cast<double>(g[h]) * r[h];
    }
    const auto mean = static_cast<float>(projection * inverse * inverse / static_cast<double>(r.size()));
    for (std::size_t h = 0; h < r.size(); ++h) d[h] += inverse * (g[h] - r[h] * mean);
    write(d, d_x, t);
  }
}

void reduce_scatter_norm_backward(Collectives& collectives, const NormGradient& input, const RmsNorm& norm, const NormOutput& d,
                                  const TensorView& d_weight) {
  residual_norm_backward(input, norm, d.residual, d_weight);
  collectives.all_gather_v(d.residual, slice_counts(rows_in(d.out, "d.out"), collectives.world().size()), d.out);
}

void norm_all_gather_backward(Collectives& collectives, const NormGradient& input, const RmsNorm& norm, const TensorView& d_x,
                              const TensorView& d_weight) {
  const SliceOf slice(collectives, rows_in(input.d_out, "d_out"));
  Buffer memory;
  const TensorView mine = memory.view(input.d_out.dtype, slice.count, input.d_out.shape[1]);
  collectives.reduce_scatter_v(input.d_out, slice.counts, mine);
  residual_norm_backward({input.residual, input.d_residual, mine}, norm, d_x, d_weight);
}

}  // namespace tokenyard
