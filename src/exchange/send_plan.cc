#include "exchange/send_plan.h"

#include <algorithm>
#include <bit>

namespace tokenyard::exchange_internal {
namespace {

template <class From, class To>
void read_token(const ConstTensorView& values, std::int64_t token, std::span<To> out) {
  const From* from = values.as<From>() + token * values.strides[0];
  const std::int64_t stride = values.ndim == 2 ? values.strides[1] : 1;
  if (stride == 1) {
    std::copy_n(from, out.size(), out.data());
    return;
  }
  for (To& value : out) {
    value = *from;
    from += stride;
  }
}

// Builds the entries of one token after the other.
class Planner {
 public:
  Planner(SendPlan& plan, const placement_internal::TableView& table, const protocol::ArenaShape& shape, int rank)
      : plan_(plan),
        table_(table),
        shape_(shape),
        rank_(rank),
        entry_to_(shape.ranks),
        ids_(plan.top_k),
        choices_(static_cast<std::size_t>(plan.top_k) * table.max_fanout),
        ranks_(shape.ranks / 64 + 1) {}

  void add_token(std::int64_t token, const PlanInput& input) {
    read_ids(input.topk_ids, token, ids_);
    const auto ticket = static_cast<std::uint32_t>(token + input.token_base);
    std::size_t chosen = 0;
    for (int k = 0; k < plan_.top_k; ++k) {
      if (ids_[k] >= table_.num_experts) ++plan_.invalid_ids;
      if (ids_[k] < 0 || ids_[k] >= table_.num_experts) continue;
      const int expert = static_cast<int>(ids_[k]);
      const std::uint32_t* shards = table_.shards_of(expert, table_.replica_for(expert, static_cast<std::uint32_t>(rank_), ticket));
      if (shards[0] == placement_internal::kNoInstance) ++plan_.lost_ids;
      for (int f = 0; f < table_.max_fanout && shards[f] != placement_internal::kNoInstance; ++f) {
        choices_[chosen++] = {shards[f], k};
        const int rank = placement_internal::instance_rank(shards[f]);
        ranks_[rank / 64] |= std::uint64_t{1} << (rank % 64);
      }
    }
    add_entries(token);
    for (std::size_t i = 0; i < chosen; ++i) add_instance(choices_[i]);
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
        plan_.entries.push_back({.rank = rank, .slot = plan_.counts[rank]++, .partial_slot = partial_slot});
      }
    }
    plan_.token_begin[token + 1] = static_cast<std::int64_t>(plan_.entries.size());
  }

  void add_instance(Choice choice) {
    const int rank = placement_internal::instance_rank(choice.instance);
    const int local = placement_internal::instance_local(choice.instance);
    const std::size_t entry = entry_to_[rank];
    plan_.entries[entry].k_mask |= std::uint64_t{1} << choice.k;
    plan_.local_ids[entry * plan_.top_k + choice.k] = local;
    ++plan_.counts[shape_.instance_word(rank, local)];
  }

  SendPlan& plan_;
  const placement_internal::TableView& table_;
  const protocol::ArenaShape& shape_;
  int rank_;
  std::vector<std::size_t> entry_to_;  // per rank: of the current token, where it has one
  std::vector<std::int64_t> ids_;      // of the current token, and
  std::vector<Choice> choices_;        // the instances that serve them
  std::vector<std::uint64_t> ranks_;   // of the current token, as bits: which they are is chance, and branches would be mispredicted
};

}  // namespace

void read_ids(const ConstTensorView& ids, std::int64_t token, std::span<std::int64_t> out) {
  if (ids.dtype == Dtype::int64) {
    read_token<std::int64_t>(ids, token, out);
  } else {
    read_token<std::int32_t>(ids, token, out);
  }
}

void read_weights(const ConstTensorView& weights, std::int64_t token, std::span<float> out) { read_token<float>(weights, token, out); }

SendPlan make_send_plan(const PlanInput& input, const placement_internal::TableView& table, const protocol::ArenaShape& shape) {
  SendPlan plan;
  plan.num_tokens = input.topk_ids.shape[0];
  plan.top_k = input.top_k;
  plan.token_begin.assign(plan.num_tokens + 1, 0);
  plan.counts.assign(shape.count_words(), 0);
  const std::int64_t most = plan.num_tokens * std::min<std::int64_t>(shape.ranks, input.top_k * shape.max_fanout);
  plan.entries.reserve(most);
  plan.local_ids.assign(most * input.top_k, -1);
  Planner planner(plan, table, shape, input.rank);
  for (std::int64_t token = 0; token < plan.num_tokens; ++token) planner.add_token(token, input);
  plan.local_ids.resize(plan.entries.size() * plan.top_k);
  return plan;
}

void offset_slots(SendPlan& plan, std::span<const std::int64_t> base) {
  for (SendEntry& entry : plan.entries) entry.slot += static_cast<std::int32_t>(base[entry.rank]);
}

}  // namespace tokenyard::exchange_internal
