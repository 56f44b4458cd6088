#include "exchange/handle_state.h"

namespace tokenyard::exchange_internal {
namespace {

// An absent tensor when the layout does not have it.
template <class T>
ConstTensorView view_of(const std::vector<T>& values, Dtype dtype, const std::vector<std::int64_t>& shape, bool present = true) {
  return present ? dense_view(values.data(), dtype, shape) : ConstTensorView();
}

ConstTensorView list_of(const std::vector<std::int32_t>& values, bool present = true) {
  return view_of(values, Dtype::int32, {static_cast<std::int64_t>(values.size())}, present);
}

}  // namespace

ReceivedViews HandleState::views() const {
  const std::vector<std::int64_t>& rows = metadata.rows_shape;
  std::vector<std::int64_t> per_k = rows;
  per_k.push_back(top_k());
  const bool expert_layout = is_expert_layout();
  const bool has_sources = layout != Layout::rank_slots;
  const auto ranks = static_cast<std::int64_t>(metadata.rank_counts.size());
  const auto experts = static_cast<std::int64_t>(metadata.expert_counts.size());
  ReceivedViews views;
  views.local_ids = view_of(metadata.local_ids, Dtype::int32, per_k, !expert_layout);
  views.row_weights = view_of(metadata.row_weights, Dtype::float32, expert_layout ? rows : per_k);
  views.source_rank = view_of(metadata.source_rank, Dtype::int32, rows, has_sources);
  views.source_token = view_of(metadata.source_token, Dtype::int32, rows, has_sources);
  views.source_k = view_of(metadata.source_k, Dtype::int32, rows, expert_layout);
  views.expert_counts = list_of(metadata.expert_counts);
  views.expert_offsets = list_of(metadata.expert_offsets, !metadata.expert_offsets.empty());
  views.expert_rows = list_of(metadata.expert_rows, layout == Layout::token_major && !metadata.expert_offsets.empty());
  views.rank_counts = list_of(metadata.rank_counts);
  views.sent_counts = list_of(metadata.sent_counts);
  views.ranges = view_of(metadata.ranges, Dtype::int32, {experts, ranks, 2}, layout == Layout::expert_padded);
  views.present = view_of(metadata.present, Dtype::uint8, rows, layout == Layout::rank_slots);
  return views;
}

}  // namespace tokenyard::exchange_internal
