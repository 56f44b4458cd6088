#include <cmath>
#include <cstring>

#include "core/usage.h"
#include "experts/row_block.h"

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

void unpermute(const ConstTensorView& places, const RowGroups& groups, const ConstTensorView& local_ids, const ConstTensorView& row_weights,
               const TensorView& out) {
  check_groups(groups);
  const std::int64_t top_k = local_ids ? local_ids.shape[local_ids.ndim - 1] : 0;
  const std::int64_t num_rows = top_k > 0 ? local_ids.num_elements() / top_k : 0;
  if (local_ids.dtype != Dtype::int32 || top_k < 1 || !local_ids.rows_contiguous()) {
    usage_error("local_ids is {}; expected dense int32, as dispatch gives them", describe(local_ids));
  }
  const std::int64_t columns = out.ndim == 2 ? out.shape[1] : 0;
  check_rows("out", out, num_rows, columns);
  check_rows("places", places, groups.places, columns);
  if (row_weights && (row_weights.dtype != Dtype::float32 || row_weights.num_elements() != local_ids.num_elements())) {
    usage_error("row_weights is {}; expected {} float32, as many as local_ids", describe(row_weights), local_ids.num_elements());
  }
  const float* weights = row_weights ? row_weights.as<float>() : nullptr;
  std::vector<std::int64_t> next = groups.begins;  // places of a group are in the order of (row, k)
  std::vector<float> sum(static_cast<std::size_t>(columns));
  std::vector<float> scratch;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    std::fill(sum.begin(), sum.end(), 0.0F);
    for (std::int64_t at = row * top_k; at < (row + 1) * top_k; ++at) {
      const std::int32_t id = local_ids.as<std::int32_t>()[at];
      if (id < 0) continue;
      if (id >= std::ssize(next) || next[id] == groups.begins[id] + groups.counts[id]) {
        usage_error("local_ids[{}] = {} has no place; pass the ids that the groups were made from", at, id);
      }
      const float* values = read_places(places, {next[id]++, 1}, scratch);
      for (std::int64_t c = 0; c < columns; ++c)
        sum[c] = weights == nullptr ? sum[c] + values[c] : std::fma(weights[at], values[c], sum[c]);
    }
    write_places(sum, {row, 1}, out);
  }
}

}  // namespace tokenyard
