// The combine half of the collective exchange: weights out, partial sums back.

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include "exchange/collective_transport.h"

namespace tokenyard::exchange_internal {
CollectiveTransport::Counts CollectiveTransport::sent_rows(const HandleState& handle) const {
  return {handle.sent.counts.begin(), handle.sent.counts.begin() + ranks_};
}

CollectiveTransport::Counts CollectiveTransport::received_rows(const HandleState& handle) const {
  Counts counts(ranks_);
  std::adjacent_difference(handle.received.source_begin.begin() + 1, handle.received.source_begin.end(), counts.begin());
  return counts;
}

Expected<std::vector<float>> CollectiveTransport::exchange_weights(const CombineCall& call, const ConstTensorView& source_weights) {
  const HandleState& handle = *call.handle;
  const int k = handle.top_k();
  const Counts out_counts = without_own(sent_rows(handle));
  auto* const out = reinterpret_cast<float*>(weights_out_.of(total(out_counts) * k * 4));
  std::vector<float> in(handle.received.size() * k);
  std::vector<float*> next(ranks_);  // rows to a rank ascend with the tokens
  const std::vector<std::int64_t> begin = starts(out_counts);
  for (int peer = 0; peer < ranks_; ++peer) next[peer] = out + begin[peer] * k;
  next[rank_] = in.data() + handle.received.source_begin[rank_] * k;
  for (std::int64_t token = 0; token < handle.sent.num_tokens; ++token) {
    for (const SendEntry& entry : handle.sent.entries_of(token)) {
      read_weights(source_weights, token, std::span(next[entry.rank], k));
      next[entry.rank] += k;
    }
  }
  auto moved = attempt(Phase::combine_weights, [&] {
    all_to_all({reinterpret_cast<const std::byte*>(out), out_counts},
               {reinterpret_cast<const std::byte*>(in.data()), received_rows(handle)}, std::int64_t{4} * k);
  });
  if (!moved) return unexpected(moved.error());
  return in;
}

// Unfolded, a row has a partial sum for each k that its rank serves; the source knows which from its plan.
CollectiveTransport::Counts CollectiveTransport::sent_partials(const CombineCall& call) const {
  if (!call.unfolded) return sent_rows(*call.handle);
  Counts counts(ranks_, 0);
  for (const SendEntry& entry : call.handle->sent.entries) counts[entry.rank] += std::popcount(entry.k_mask);
  return counts;
}

CollectiveTransport::Counts CollectiveTransport::received_partials(const CombineCall& call) const {
  Counts counts = received_rows(*call.handle);
  if (!call.unfolded) return counts;
  const ReceivedRows& received = call.handle->received;
  const int k = call.handle->top_k();
  for (int source = 0; source < ranks_; ++source) {
    const auto begin = received.local_ids.begin() + received.source_begin[source] * k;
    counts[source] = std::count_if(begin, begin + counts[source] * k, [](std::int32_t local) { return local >= 0; });
  }
  return counts;
}

// Partial sums go back in the order in which rows came. In token_major they are y's rows, in that very order: they leave from there.
Expected<RowTransport::PartialTargets> CollectiveTransport::begin_partials(const CombineCall& call) {
  const HandleState& handle = *call.handle;
  const int k = handle.top_k();
  const Counts rows = received_rows(handle);
  for (int peer = 0; peer < ranks_; ++peer) link_bytes_[peer] += rows[peer] * call.row_bytes;
  PartialTargets targets;
  targets.pulled = call.pullable && handle.layout == Layout::token_major;
  returned_ = targets.pulled ? rows : without_own(received_partials(call));
  const Counts weight_rows = without_own(rows);
  std::byte* next = targets.pulled ? nullptr : out_.of(total(returned_) * call.row_bytes);
  auto* next_weight = reinterpret_cast<float*>(call.header.row_weights != 0 ? weights_out_.of(total(weight_rows) * k * 4) : nullptr);
  targets.partials.assign(handle.received.size() * (call.unfolded ? k : 1), nullptr);
  targets.weights.assign(handle.received.size(), nullptr);
  for (int source = 0; source < ranks_; ++source) {
    if (source == rank_) continue;
    for (std::int64_t i = handle.received.source_begin[source]; i < handle.received.source_begin[source + 1]; ++i) {
      if (next_weight != nullptr) targets.weights[i] = std::exchange(next_weight, next_weight + k);
      if (targets.pulled) continue;
      if (!call.unfolded) targets.partials[i] = std::exchange(next, next + call.row_bytes);
      for (std::int64_t at = i * k; call.unfolded && at < (i + 1) * k; ++at) {
        if (handle.received.local_ids[at] >= 0) targets.partials[at] = std::exchange(next, next + call.row_bytes);
      }
    }
  }
  return targets;
}

Expected<void> CollectiveTransport::publish_partials(const CombineCall& call, const PartialTargets& targets) {
  const Counts in_counts = without_own(sent_partials(call));
  const std::byte* const out = targets.pulled ? static_cast<const std::byte*>(call.y) : out_.of(0);
  std::byte* const in = in_.of(total(in_counts) * call.row_bytes);
  return attempt(Phase::combine_rows, [&] {
    if (call.row_bytes > 0) all_to_all({out, returned_}, {in, in_counts}, call.row_bytes);
    if (call.header.row_weights == 0) return;
    const Counts out_rows = without_own(received_rows(*call.handle));
    const Counts in_rows = without_own(sent_rows(*call.handle));
    const std::int64_t row_bytes = std::int64_t{4} * call.handle->top_k();
    all_to_all({weights_out_.of(0), out_rows}, {weights_in_.of(total(in_rows) * row_bytes), in_rows}, row_bytes);
  });
}

Expected<RowTransport::PartialSources> CollectiveTransport::await_partials(const CombineCall& call) {
  const SendPlan& plan = call.handle->sent;
  const int k = plan.top_k;
  PartialSources sources;
  sources.partials.assign(plan.entries.size() * (call.unfolded ? k : 1), nullptr);
  sources.weights.assign(plan.entries.size(), nullptr);
  Counts next = starts(without_own(sent_partials(call)));
  Counts next_weight = starts(without_own(sent_rows(*call.handle)));
  const std::byte* const partials = in_.of(0);
  const auto* const weights = reinterpret_cast<const float*>(weights_in_.of(0));
  for (std::size_t at = 0; at < plan.entries.size(); ++at) {
    const SendEntry& entry = plan.entries[at];
    if (entry.rank == rank_) continue;
    if (call.header.row_weights != 0) sources.weights[at] = weights + next_weight[entry.rank]++ * k;
    if (!call.unfolded) sources.partials[at] = partials + next[entry.rank]++ * call.row_bytes;
    for (int j = 0; call.unfolded && j < k; ++j) {
      if ((entry.k_mask >> j & 1) != 0) sources.partials[at * k + j] = partials + next[entry.rank]++ * call.row_bytes;
    }
  }
  return sources;
}

Expected<std::byte*> CollectiveTransport::expert_rows() {
  if (!expert_rows_.data) expert_rows_ = allocate_rows(shape_.receive_rows * shape_.row_bytes);
  return expert_rows_.data.get();
}

}  // namespace tokenyard::exchange_internal
