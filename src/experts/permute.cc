#include <algorithm>
#include <cstring>

#include "core/usage.h"
#include "experts/row_block.h"
#include "kernels/cpu/kernels.h"

namespace tokenyard {

using namespace experts_internal;  // NOLINT(google-build-using-namespace): this file is a part of it

void permute(const ConstTensorView& rows, const RowGroups& groups, const TensorView& out) {
  check_groups(groups);
  const bool fits = rows.ndim == 2 && out.ndim == 2 && rows.shape[1] == out.shape[1] && rows.dtype == out.dtype;
  if (!fits || out.shape[0] != groups.places || !rows.rows_contiguous() || !out.rows_contiguous()) {
    usage_error("rows are {} and out is {}; expected [{}, as rows] of one dtype, contiguous rows", describe(rows), describe(out),
                groups.places);
  }
  const auto row_bytes = static_cast<std::size_t>(rows.shape[1] * size_of(rows.dtype));
  for_each_block(groups, [&](std::int64_t, Places places) {
    for (std::int64_t p = places.begin; p < places.begin + places.count; ++p) {
      const std::int64_t row = groups.rows.empty() ? p : groups.rows[static_cast<std::size_t>(p)];
      if (row < 0 || row >= rows.shape[0]) usage_error("place {} is row {}, and there are {}", p, row, rows.shape[0]);
      std::memcpy(out.row(p), rows.row(row), row_bytes);
    }
  });
}

namespace {

std::int64_t check_fold(const FoldInput& input, const RowGroups& groups) {
  check_groups(groups);
  const ConstTensorView& ids = input.local_ids;
  const std::int64_t top_k = ids ? ids.shape[ids.ndim - 1] : 0;
  if (ids.dtype != Dtype::int32 || top_k < 1 || !ids.rows_contiguous()) {
    usage_error("local_ids is {}; expected dense int32, as dispatch gives them", describe(ids));
  }
  const ConstTensorView& weights = input.row_weights;
  if (weights && (weights.dtype != Dtype::float32 || weights.num_elements() != ids.num_elements())) {
    usage_error("row_weights is {}; expected {} float32, as many as local_ids", describe(weights), ids.num_elements());
  }
  return top_k;
}

void check_same_dtype(const char* a_name, const ConstTensorView& a, const char* b_name, const ConstTensorView& b) {
  if (a.dtype != b.dtype) usage_error("{} is {} and {} {}; use one dtype", a_name, describe(a), b_name, describe(b));
}

// fn(row, index of (row, k), place) in the order of rows and k: places of a group are in that order, too.
template <class Fn>
void for_each_pair(const FoldInput& input, const RowGroups& groups, std::int64_t top_k, Fn&& fn) {
  std::vector<std::int64_t> next = groups.begins;
  const auto* ids = input.local_ids.as<std::int32_t>();
  for (std::int64_t at = 0; at < input.local_ids.num_elements(); ++at) {
    const std::int32_t id = ids[at];
    if (id < 0) continue;
    if (id >= std::ssize(next) || next[id] == groups.begins[id] + groups.counts[id]) {
      usage_error("local_ids[{}] = {} has no place; pass the ids that the groups were made from", at, id);
    }
    fn(at / top_k, at, next[id]++);
  }
}

}  // namespace

void unpermute(const FoldInput& input, const RowGroups& groups, const TensorView& out) {
  const std::int64_t top_k = check_fold(input, groups);
  const std::int64_t num_rows = input.local_ids.num_elements() / top_k;
  const std::int64_t columns = out.ndim == 2 ? out.shape[1] : 0;
  check_rows("out", out, num_rows, columns);
  check_rows("places", input.places, groups.places, columns);
  check_same_dtype("places", input.places, "out", out);
  std::vector<const void*> rows;  // of one token
  std::vector<float> weights;
  std::int64_t row = 0;  // rows before it are written
  const auto finish_rows = [&](std::int64_t end) {
    for (; row < end; ++row) {
      cpu::fold({.rows = rows.data(),
                 .weights = input.row_weights ? weights.data() : nullptr,
                 .count = static_cast<int>(rows.size()),
                 .dtype = out.dtype,
                 .elements = columns,
                 .out = out.row(row)});
      rows.clear();
      weights.clear();
    }
  };
  for_each_pair(input, groups, top_k, [&](std::int64_t of_row, std::int64_t at, std::int64_t place) {
    finish_rows(of_row);
    rows.push_back(input.places.row(place));
    if (input.row_weights) weights.push_back(input.row_weights.as<float>()[at]);
  });
  finish_rows(num_rows);
}

void unpermute_backward(const FoldInput& input, const RowGroups& groups, const ConstTensorView& d_out, const TensorView& d_places,
                        const TensorView& d_row_weights) {
  const std::int64_t top_k = check_fold(input, groups);
  const std::int64_t num_rows = input.local_ids.num_elements() / top_k;
  const std::int64_t columns = d_out.ndim == 2 ? d_out.shape[1] : 0;
  check_rows("d_out", d_out, num_rows, columns);
  check_rows("d_places", d_places, groups.places, columns);
  check_same_dtype("d_out", d_out, "d_places", d_places);
  if (d_row_weights) {
    check_rows("places", input.places, groups.places, columns);
    check_same_dtype("d_out", d_out, "places", input.places);
    const bool fits = d_row_weights.dtype == Dtype::float32 && d_row_weights.num_elements() == input.local_ids.num_elements();
    if (!fits || !d_row_weights.rows_contiguous()) {
      usage_error("d_row_weights is {}; expected {} float32, as many as local_ids", describe(d_row_weights),
                  input.local_ids.num_elements());
    }
    std::fill_n(d_row_weights.as<float>(), d_row_weights.num_elements(), 0.0F);
  }
  for_each_pair(input, groups, top_k, [&](std::int64_t row, std::int64_t at, std::int64_t place) {
    const float weight = input.row_weights ? input.row_weights.as<float>()[at] : 1.0F;
    cpu::scale_row(d_places.row(place), d_out.row(row), weight, d_out.dtype, columns);
    if (d_row_weights) d_row_weights.as<float>()[at] = cpu::dot(d_out.row(row), input.places.row(place), d_out.dtype, columns);
  });
}

}  // namespace tokenyard
