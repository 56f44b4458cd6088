#include "core/usage.h"
#include "experts/row_block.h"
#include "experts/sgemm.h"

namespace tokenyard {

using namespace experts_internal;  // NOLINT(google-build-using-namespace): this file is a part of it

namespace {

std::int64_t size_at(const ConstTensorView& view, int dimension) { return view.ndim > dimension ? view.shape[dimension] : 0; }

}  // namespace

void grouped_gemm(const ConstTensorView& x, const RowGroups& groups, const ConstTensorView& w, const ConstTensorView& bias,
                  const TensorView& y) {
  check_input(x, groups);
  const std::int64_t outputs = size_at(w, 1);
  const std::int64_t inputs = x.shape[1];
  const auto num_groups = std::ssize(groups.counts);
  check_dense("w", w, {num_groups, outputs, inputs});
  if (bias) check_dense("bias", bias, {num_groups, outputs});
  check_rows("y", y, groups.places, outputs);
  GroupTensor weights(w);
  GroupTensor biases(bias);
  thread_local std::vector<float> scratch, result;  // of a block, at most; the next call has them again
  for_each_block(groups, [&](std::int64_t group, Places places) {
    result.resize(static_cast<std::size_t>(places.count * outputs));
    multiply({.m = places.count,
              .n = outputs,
              .k = inputs,
              .a = {read_rows(x, groups, places, scratch), inputs},
              .b = {weights.of(group), inputs, true},
              .c = result.data(),
              .c_stride = outputs});
    for (std::int64_t i = 0; bias && i < places.count; ++i) {
      for (std::int64_t o = 0; o < outputs; ++o) result[i * outputs + o] += biases.of(group)[o];
    }
    write_places(result, places, y);
  });
}

void grouped_gemm_dgrad(const ConstTensorView& dy, const RowGroups& groups, const ConstTensorView& w, const TensorView& dx) {
  check_groups(groups);
  const std::int64_t outputs = size_at(w, 1);
  const std::int64_t inputs = size_at(w, 2);
  check_dense("w", w, {std::ssize(groups.counts), outputs, inputs});
  check_rows("dy", dy, groups.places, outputs);
  check_rows("dx", dx, groups.places, inputs);
  GroupTensor weights(w);
  thread_local std::vector<float> scratch, result;  // of a block, at most; the next call has them again
  for_each_block(groups, [&](std::int64_t group, Places places) {
    result.resize(static_cast<std::size_t>(places.count * inputs));
    multiply({.m = places.count,
              .n = inputs,
              .k = outputs,
              .a = {read_places(dy, places, scratch), outputs},
              .b = {weights.of(group), inputs},
              .c = result.data(),
              .c_stride = inputs});
    write_places(result, places, dx);
  });
}

void grouped_gemm_wgrad(const ConstTensorView& dy, const ConstTensorView& x, const RowGroups& groups, const TensorView& dw) {
  check_input(x, groups);
  const std::int64_t outputs = size_at(dy, 1);
  const std::int64_t inputs = x.shape[1];
  check_rows("dy", dy, groups.places, outputs);
  check_float32("dw", dw, {std::ssize(groups.counts), outputs, inputs});
  thread_local std::vector<float> x_scratch, dy_scratch;
  for_each_block(groups, [&](std::int64_t group, Places places) {
    multiply({.m = outputs,
              .n = inputs,
              .k = places.count,
              .a = {read_places(dy, places, dy_scratch), outputs, true},
              .b = {read_rows(x, groups, places, x_scratch), inputs},
              .accumulate = true,
              .c = dw.as<float>() + group * outputs * inputs,
              .c_stride = inputs});
  });
}

}  // namespace tokenyard
