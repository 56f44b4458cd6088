#include "exchange/layout.h"

#include <algorithm>
#include <numeric>

namespace tokenyard::exchange_internal {
namespace {

// Rows of a group, its padding included.
std::int64_t padded(std::int64_t rows, int alignment) { return protocol::align_up(rows, alignment); }

Failure expert_overflow(std::int64_t needed, std::int64_t capacity, const char* what) {
  Failure failure{.kind = FailureKind::overflow, .phase = Phase::dispatch_rows, .expected = capacity, .seen = needed};
  failure.detail = what;
  return failure;
}

std::vector<std::int32_t> count_experts(const ReceivedRows& received, int local_experts) {
  // -1 is counted too, then dropped: which ids are local is chance, and a branch on it is mispredicted half of the time.
  std::vector<std::int32_t> counts(local_experts + 1, 0);
  for (const std::int32_t local : received.local_ids) ++counts[local + 1];
  counts.erase(counts.begin());
  return counts;
}

template <class Visit>
void for_each_received(const ReceivedRows& received, Visit&& visit) {
  const int ranks = static_cast<int>(received.source_begin.size()) - 1;
  for (int source = 0; source < ranks; ++source) {
    for (std::int64_t i = received.source_begin[source]; i < received.source_begin[source + 1]; ++i) visit(i, source);
  }
}

// `values`, and `padding` up to `size`.
template <class T>
std::vector<T> padded_to(std::int64_t size, const std::vector<T>& values, T padding) {
  std::vector<T> result;
  result.reserve(size);
  result.assign(values.begin(), values.end());
  result.resize(size, padding);
  return result;
}

void lay_out_token_major(HandleState& handle, const LayoutOptions& options, const protocol::ArenaShape& shape) {
  Metadata& meta = handle.metadata;
  const ReceivedRows& received = handle.received;
  const std::int64_t rows = options.sizing == Sizing::exact ? received.size() : shape.receive_rows;
  meta.rows_shape = {rows};
  meta.num_rows = received.size();
  const int k = handle.top_k();
  meta.local_ids = padded_to(rows * k, received.local_ids, -1);
  meta.row_weights = padded_to(rows * k, received.weights, 0.0F);
  meta.source_token = padded_to(rows, received.source_token, -1);
  meta.source_rank.reserve(rows);
  for (std::int64_t source = 0; source < shape.ranks; ++source) {
    meta.source_rank.resize(received.source_begin[source + 1], static_cast<std::int32_t>(source));
  }
  meta.source_rank.resize(rows, -1);
  if (!options.gather_map) return;
  meta.expert_offsets.assign(options.local_experts + 1, 0);
  std::inclusive_scan(meta.expert_counts.begin(), meta.expert_counts.end(), meta.expert_offsets.begin() + 1);
  const std::int64_t capacity = options.max_expert_rows != 0 ? options.max_expert_rows : shape.receive_rows * handle.top_k();
  meta.expert_rows.assign(options.sizing == Sizing::exact ? meta.expert_offsets.back() : capacity, -1);
  std::vector<std::int32_t> next(meta.expert_offsets.begin(), meta.expert_offsets.end() - 1);
  for (std::int64_t at = 0; at < received.size() * k; ++at) {
    const std::int32_t local = received.local_ids[at];
    if (local >= 0) meta.expert_rows[next[local]++] = static_cast<std::int32_t>(at / k);
  }
}

void lay_out_rank_slots(HandleState& handle, const protocol::ArenaShape& shape) {
  Metadata& meta = handle.metadata;
  const ReceivedRows& received = handle.received;
  const std::int64_t per_rank = shape.max_tokens_per_rank;
  meta.rows_shape = {shape.ranks, per_rank};
  meta.num_rows = received.size();
  meta.present.assign(shape.ranks * per_rank, 0);
  const int k = handle.top_k();
  meta.local_ids.assign(shape.ranks * per_rank * k, -1);
  meta.row_weights.assign(shape.ranks * per_rank * k, 0.0F);
  for_each_received(received, [&](std::int64_t i, int source) {
    const std::int64_t row = source * per_rank + received.source_token[i];
    meta.present[row] = 1;
    std::copy_n(&received.local_ids[i * k], k, &meta.local_ids[row * k]);
    std::copy_n(&received.weights[i * k], k, &meta.row_weights[row * k]);
  });
}

// Where each expert's rows begin, and how many it keeps.
struct Groups {
  std::vector<std::int64_t> begin;  // [L]
  std::vector<std::int64_t> limit;  // [L] rows it may hold
  std::int64_t rows = 0;            // of the whole output
};

Expected<Groups> group_experts(HandleState& handle, const LayoutOptions& options, const protocol::ArenaShape& shape) {
  Metadata& meta = handle.metadata;
  Groups groups;
  const bool is_padded = handle.layout == Layout::expert_padded;
  const std::int64_t capacity = is_padded && options.expert_capacity == 0 ? shape.receive_rows : options.expert_capacity;
  std::int64_t end = 0;
  for (std::int32_t& count : meta.expert_counts) {
    if (capacity != 0 && count > capacity) {
      if (!options.drop)
        return unexpected(expert_overflow(count, capacity, "rows of one expert against expert_capacity; set drop or raise it"));
      count = static_cast<std::int32_t>(capacity);
    }
    groups.begin.push_back(end);
    groups.limit.push_back(count);
    end += is_padded ? capacity : padded(count, options.alignment);
  }
  groups.rows = end;
  if (is_padded) {
    meta.rows_shape = {options.local_experts, capacity};
    meta.num_rows = std::reduce(groups.limit.begin(), groups.limit.end(), std::int64_t{0});
    return groups;
  }
  std::int64_t bound = options.max_expert_rows;
  if (bound == 0)
    bound = padded(shape.receive_rows * handle.top_k() + std::int64_t{options.local_experts} * (options.alignment - 1), options.alignment);
  if (options.sizing == Sizing::capacity && end > bound) {
    return unexpected(expert_overflow(end, bound, "rows of expert_major against max_expert_rows; raise it"));
  }
  meta.expert_offsets.assign(groups.begin.begin(), groups.begin.end());
  meta.expert_offsets.push_back(static_cast<std::int32_t>(end));
  meta.rows_shape = {options.sizing == Sizing::exact ? end : bound};
  meta.num_rows = end;
  return groups;
}

Expected<void> lay_out_experts(HandleState& handle, const LayoutOptions& options, const protocol::ArenaShape& shape) {
  Expected<Groups> groups = group_experts(handle, options, shape);
  if (!groups) return unexpected(groups.error());
  Metadata& meta = handle.metadata;
  const ReceivedRows& received = handle.received;
  const int k = handle.top_k();
  const std::int64_t rows = meta.total_rows();
  meta.row_weights.assign(rows, 0.0F);
  for (auto* indices : {&meta.source_rank, &meta.source_token, &meta.source_k}) indices->assign(rows, -1);
  const bool is_padded = handle.layout == Layout::expert_padded;
  if (is_padded) meta.ranges.assign(options.local_experts * shape.ranks * 2, 0);
  handle.expert_row.assign(received.size() * k, -1);
  std::vector<std::int64_t> filled(options.local_experts, 0);
  for_each_received(received, [&](std::int64_t i, int source) {
    for (int j = 0; j < k; ++j) {
      const std::int32_t local = received.local_ids[i * k + j];
      if (local < 0) continue;
      if (filled[local] == groups->limit[local]) {
        ++handle.dropped_rows[local];
        continue;
      }
      if (is_padded) {
        std::int32_t* range = &meta.ranges[(local * shape.ranks + source) * 2];
        ++range[1];
      }
      const std::int64_t row = groups->begin[local] + filled[local]++;
      handle.expert_row[i * k + j] = static_cast<std::int32_t>(row);
      meta.row_weights[row] = received.weights[i * k + j];
      meta.source_rank[row] = source;
      meta.source_token[row] = received.source_token[i];
      meta.source_k[row] = j;
    }
  });
  for (std::int64_t at = 0; at < static_cast<std::int64_t>(meta.ranges.size()); at += 2) {  // also where nothing came from a source
    meta.ranges[at] = at % (shape.ranks * 2) == 0 ? 0 : meta.ranges[at - 2] + meta.ranges[at - 1];
  }
  return {};
}

}  // namespace

Expected<void> lay_out(HandleState& handle, const LayoutOptions& options, const protocol::ArenaShape& shape) {
  Metadata& meta = handle.metadata;
  handle.dropped_rows.assign(options.local_experts, 0);
  meta.expert_counts = count_experts(handle.received, options.local_experts);
  meta.rank_counts.resize(shape.ranks);
  meta.sent_counts.assign(handle.sent.counts.begin(), handle.sent.counts.begin() + shape.ranks);
  for (std::int64_t r = 0; r < shape.ranks; ++r) {
    meta.rank_counts[r] = static_cast<std::int32_t>(handle.received.source_begin[r + 1] - handle.received.source_begin[r]);
  }
  switch (handle.layout) {
    case Layout::token_major:
      lay_out_token_major(handle, options, shape);
      return {};
    case Layout::rank_slots:
      lay_out_rank_slots(handle, shape);
      return {};
    case Layout::expert_major:
    case Layout::expert_padded:
      return lay_out_experts(handle, options, shape);
  }
  return {};
}

}  // namespace tokenyard::exchange_internal
