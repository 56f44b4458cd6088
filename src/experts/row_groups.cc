#include <algorithm>
#include <numeric>

#include "core/usage.h"
#include "tokenyard/experts.h"

namespace tokenyard {
namespace {

std::vector<std::int64_t> integers(const char* what, const ConstTensorView& view) {
  const bool is_integer = view.dtype == Dtype::int64 || view.dtype == Dtype::int32;
  if (!view || !is_integer || !view.rows_contiguous()) usage_error("{} is {}; expected dense int64 or int32", what, describe(view));
  std::vector<std::int64_t> values(static_cast<std::size_t>(view.num_elements()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = view.dtype == Dtype::int64 ? view.as<std::int64_t>()[i] : view.as<std::int32_t>()[i];
  }
  return values;
}

}  // namespace

RowGroups RowGroups::of(const Received& received, int num_local_experts) {
  switch (received.handle().layout()) {
    case Layout::expert_major:
      return of_offsets(received.expert_counts(), received.expert_offsets());
    case Layout::expert_padded:
      return padded(received.expert_counts(), received.rows().shape[1]);
    default:
      return gathered(received.local_ids(), num_local_experts);
  }
}

RowGroups RowGroups::of_offsets(const ConstTensorView& counts, const ConstTensorView& offsets) {
  RowGroups groups;
  groups.counts = integers("counts", counts);
  groups.begins = integers("offsets", offsets);
  if (groups.begins.size() != groups.counts.size() + 1) {
    usage_error("{} counts and {} offsets; offsets are one more: where each group begins, and the end", groups.counts.size(),
                groups.begins.size());
  }
  groups.places = groups.begins.back();
  groups.begins.pop_back();
  return groups;
}

RowGroups RowGroups::padded(const ConstTensorView& counts, std::int64_t capacity) {
  RowGroups groups;
  groups.counts = integers("counts", counts);
  for (std::int64_t g = 0; g < std::ssize(groups.counts); ++g) {
    if (groups.counts[g] > capacity) usage_error("counts[{}] = {} exceeds the capacity of {} rows", g, groups.counts[g], capacity);
    groups.begins.push_back(g * capacity);
  }
  groups.places = std::ssize(groups.counts) * capacity;
  return groups;
}

RowGroups RowGroups::gathered(const ConstTensorView& local_ids, int num_local_experts) {
  const std::vector<std::int64_t> ids = integers("local_ids", local_ids);
  const std::int64_t top_k = std::max<std::int64_t>(1, local_ids.shape[local_ids.ndim - 1]);
  RowGroups groups;
  groups.counts.assign(static_cast<std::size_t>(num_local_experts), 0);
  for (const std::int64_t id : ids) {
    if (id >= num_local_experts)
      usage_error("local_ids has {}; with {} local experts an id is below that, or negative", id, num_local_experts);
    if (id >= 0) ++groups.counts[id];
  }
  groups.begins.resize(groups.counts.size());
  std::exclusive_scan(groups.counts.begin(), groups.counts.end(), groups.begins.begin(), std::int64_t{0});
  groups.places = std::accumulate(groups.counts.begin(), groups.counts.end(), std::int64_t{0});
  groups.rows.resize(static_cast<std::size_t>(groups.places));
  std::vector<std::int64_t> next = groups.begins;
  for (std::int64_t at = 0; at < std::ssize(ids); ++at) {
    if (ids[at] >= 0) groups.rows[next[ids[at]]++] = at / top_k;
  }
  return groups;
}

}  // namespace tokenyard
