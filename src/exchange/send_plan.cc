#include "exchange/send_plan.h"

#include <algorithm>
#include <bit>

namespace tokenyard::exchange_internal {
namespace {

// Builds the entries of one token after the other.
class Planner {
 public:
  Planner(SendPlan& plan, const placement_internal::TableView& table, const protocol::ArenaShape& shape, int rank)
      : plan_(plan),
        table_(table),
        shape_(shape),
        rank_(rank),
        rows_to_(shape.ranks, 0),
        entry_to_(shape.ranks),
        ranks_(shape.ranks / 64 + 1) {}

  void add_token(std::int64_t token, const PlanInput& input) {
    instances_.clear();
    for (int k = 0; k < input.top_k; ++k) {
      const std::int64_t expert = id_at(input.topk_ids, token, k);
      if (expert >= table_.num_experts) ++plan_.invalid_ids;
      if (expert < 0 || expert >= table_.num_experts) continue;
      const auto ticket = static_cast<std::uint32_t>(token + input.token_base);
      const int replica = table_.replica_for(static_cast<int>(expert), static_cast<std::uint32_t>(rank_), ticket);
      const std::uint32_t* shards = table_.shards_of(static_cast<int>(expert), replica);
      if (shards[0] == placement_internal::kNoInstance) ++plan_.lost_ids;
      for (int f = 0; f < table_.max_fanout && shards[f] != placement_internal::kNoInstance; ++f) {
        instances_.push_back({shards[f], k});
        const int rank = placement_internal::instance_rank(shards[f]);
        ranks_[rank / 64] |= std::uint64_t{1} << (rank % 64);
      }
    }
    add_entries(token);
    for (const auto& [instance, k] : instances_) add_instance(instance, k);
  }

 private:
  struct Choice {
    std::uint32_t instance;
    int k;
  };

  void add_entries(std::int64_t token) {
    const auto base = static_cast<std::int32_t>(token * shape_.partials_per_token());
    std::int32_t ordinal = 0;
    for (std::size_t word = 0; word < ranks_.size(); ++word) {
      for (; ranks_[word] != 0; ranks_[word] &= ranks_[word] - 1) {
        const int rank = static_cast<int>(word) * 64 + std::countr_zero(ranks_[word]);
        entry_to_[rank] = plan_.entries.size();
        const std::int32_t partial_slot = rank == rank_ ? -1 : base + ordinal++;
        plan_.entries.push_back({.rank = rank, .slot = rows_to_[rank]++, .partial_slot = partial_slot});
        ++plan_.counts[rank];
      }
    }
    plan_.local_ids.resize(plan_.entries.size() * plan_.top_k, -1);
    plan_.token_begin[token + 1] = static_cast<std::int64_t>(plan_.entries.size());
  }

  void add_instance(std::uint32_t instance, int k) {
    const int rank = placement_internal::instance_rank(instance);
    const int local = placement_internal::instance_local(instance);
    const std::size_t entry = entry_to_[rank];
    plan_.entries[entry].k_mask |= std::uint64_t{1} << k;
    plan_.local_ids[entry * plan_.top_k + k] = local;
    ++plan_.counts[shape_.instance_word(rank, local)];
  }

  SendPlan& plan_;
  const placement_internal::TableView& table_;
  const protocol::ArenaShape& shape_;
  int rank_;
  std::vector<std::int32_t> rows_to_;
  std::vector<std::size_t> entry_to_;  // per rank: of the current token, where it has one
  std::vector<Choice> instances_;      // of the current token
  std::vector<std::uint64_t> ranks_;   // of the current token, as bits: which they are is chance, and branches would be mispredicted
};

}  // namespace

std::int64_t id_at(const ConstTensorView& ids, std::int64_t token, int k) {
  const std::int64_t at = token * ids.strides[0] + (ids.ndim == 2 ? k * ids.strides[1] : 0);
  return ids.dtype == Dtype::int64 ? ids.as<std::int64_t>()[at] : ids.as<std::int32_t>()[at];
}

float weight_at(const ConstTensorView& weights, std::int64_t token, int k) {
  return weights.as<float>()[token * weights.strides[0] + (weights.ndim == 2 ? k * weights.strides[1] : 0)];
}

SendPlan make_send_plan(const PlanInput& input, const placement_internal::TableView& table, const protocol::ArenaShape& shape) {
  SendPlan plan;
  plan.num_tokens = input.topk_ids.shape[0];
  plan.top_k = input.top_k;
  plan.token_begin.assign(plan.num_tokens + 1, 0);
  plan.counts.assign(shape.count_words(), 0);
  const std::int64_t likely = plan.num_tokens * std::min<std::int64_t>(shape.ranks, input.top_k * shape.max_fanout);
  plan.entries.reserve(likely);
  plan.local_ids.reserve(likely * input.top_k);
  Planner planner(plan, table, shape, input.rank);
  for (std::int64_t token = 0; token < plan.num_tokens; ++token) planner.add_token(token, input);
  return plan;
}

void offset_slots(SendPlan& plan, std::span<const std::int64_t> base) {
  for (SendEntry& entry : plan.entries) entry.slot += static_cast<std::int32_t>(base[entry.rank]);
}

}  // namespace tokenyard::exchange_internal
