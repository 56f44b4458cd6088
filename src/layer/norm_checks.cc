#include "layer/norm_checks.h"

#include "core/usage.h"
#include "experts/row_block.h"

namespace tokenyard::layer_internal {
namespace {

using experts_internal::check_rows;

void check_vector(const char* what, const ConstTensorView& view, std::int64_t elements) {
  if (view.ndim != 1 || view.shape[0] != elements || view.strides[0] != 1) {
    usage_error("{} is {}; expected [{}], dense", what, describe(view), elements);
  }
}

void check_weight(const RmsNorm& norm, std::int64_t elements) {
  if (!norm.weight) usage_error("the norm has no weight; expected [{}], ones for none", elements);
  check_vector("norm.weight", norm.weight, elements);
}

// One dtype per call.
void check_alike(const char* what, const ConstTensorView& view, const char* first, const ConstTensorView& like) {
  check_rows(what, view, like.shape[0], like.shape[1]);
  if (view.dtype != like.dtype) usage_error("{} is {} and {} {}; use one dtype", first, describe(like), what, describe(view));
}

}  // namespace

std::int64_t rows_in(const char* what, const ConstTensorView& view) {
  if (view.ndim != 2) usage_error("{} is {}; expected [tokens, hidden_size]", what, view ? describe(view) : "absent");
  return view.shape[0];
}

void check_norm(const ResidualInput& input, const RmsNorm& norm, const NormOutput& output) {
  const std::int64_t tokens = rows_in("x", input.x), hidden_size = input.x.shape[1];
  check_rows("x", input.x, tokens, hidden_size);
  if (input.residual) check_alike("residual", input.residual, "x", input.x);
  check_alike("output.residual", output.residual, "x", input.x);
  check_alike("output.out", output.out, "x", input.x);
  if (output.inverse) experts_internal::check_float32("output.inverse", output.inverse, {tokens});
  check_weight(norm, hidden_size);
  if (!input.bias) return;
  check_vector("bias", input.bias, hidden_size);
  if (input.bias.dtype != input.x.dtype) usage_error("x is {} and bias {}; use one dtype", describe(input.x), describe(input.bias));
}

void check_norm_backward(const NormGradient& input, const RmsNorm& norm, const ConstTensorView& d_x, const ConstTensorView& d_weight) {
  const std::int64_t tokens = rows_in("residual", input.residual), hidden_size = input.residual.shape[1];
  check_rows("residual", input.residual, tokens, hidden_size);
  check_alike("d_out", input.d_out, "residual", input.residual);
  check_alike("d_x", d_x, "residual", input.residual);
  if (input.d_residual) check_alike("d_residual", input.d_residual, "residual", input.residual);
  if (input.inverse) experts_internal::check_float32("inverse", input.inverse, {tokens});
  if (d_weight) experts_internal::check_float32("d_weight", d_weight, {hidden_size});
  check_weight(norm, hidden_size);
}

SliceOf::SliceOf(const World& world, std::int64_t tokens) : counts(slice_counts(tokens, world.size())) {
  for (int rank = 0; rank < world.rank(); ++rank) begin += counts[static_cast<std::size_t>(rank)];
  count = counts[static_cast<std::size_t>(world.rank())];
}

}  // namespace tokenyard::layer_internal
