#include "tokenyard/placement.h"

#include <algorithm>

#include "core/usage.h"
#include "placement/build.h"
#include "placement/table.h"

namespace tokenyard {
namespace {

// The contiguous windows of uniform: window w of `windows` holds experts first(w) .. first(w + 1) - 1.
struct Windows {
  int num_experts;
  int windows;
  int first(int window) const { return window * (num_experts / windows) + std::min(window, num_experts % windows); }
};

std::vector<std::vector<Replica>> sharded_windows(int num_experts, int ep, int tp) {
  const Windows windows{num_experts, ep};
  std::vector<std::vector<Replica>> replicas(static_cast<std::size_t>(num_experts));
  for (int window = 0; window < ep; ++window) {
    Replica replica;
    for (int shard = 0; shard < tp; ++shard) replica.shard_ranks.push_back(window * tp + shard);
    for (int expert = windows.first(window); expert < windows.first(window + 1); ++expert) replicas[expert].push_back(replica);
  }
  return replicas;
}

void check_index(const char* what, int value, int count) {
  if (value < 0 || value >= count) usage_error("{} = {}; this placement has {} in 0..{}", what, value, what, count - 1);
}

}  // namespace

Placement Placement::uniform(int num_experts, int ranks, const UniformOptions& options) {
  placement_internal::check_sizes(num_experts, ranks);
  if (options.require_equal_windows && num_experts % ranks != 0) {
    usage_error(
        "num_experts = {} is not a multiple of ranks = {}: windows would hold {} or {} experts, and require_equal_windows is set; "
        "change a number or clear the option",
        num_experts, ranks, num_experts / ranks, num_experts / ranks + 1);
  }
  return custom(ranks, sharded_windows(num_experts, ranks, 1));
}

Placement Placement::tensor_parallel(int num_experts, int ep, int tp) {
  if (ep < 1 || tp < 1) usage_error("ep = {}, tp = {}; both are at least 1", ep, tp);
  const std::int64_t ranks = static_cast<std::int64_t>(ep) * tp;
  if (ranks > placement_internal::kMaxRanks) {
    usage_error("ep x tp = {} x {} = {} ranks; a placement has 1..{} ranks", ep, tp, ranks, placement_internal::kMaxRanks);
  }
  placement_internal::check_sizes(num_experts, ranks);
  return custom(static_cast<int>(ranks), sharded_windows(num_experts, ep, tp));
}

Placement Placement::custom(int ranks, const std::vector<std::vector<Replica>>& replicas) {
  return Placement(std::make_shared<const placement_internal::Table>(placement_internal::build_table(ranks, replicas)));
}

Placement Placement::restricted_to(std::span<const int> survivors) const {
  std::vector<int> renumbered(static_cast<std::size_t>(ranks()), -1);
  for (int i = 0; i < std::ssize(survivors); ++i) {
    check_index("rank", survivors[i], ranks());
    if (i > 0 && survivors[i] <= survivors[i - 1]) {
      usage_error("survivors names rank {} after rank {}; give them ascending, each once", survivors[i], survivors[i - 1]);
    }
    renumbered[survivors[i]] = i;
  }
  std::vector<std::vector<Replica>> left(static_cast<std::size_t>(num_experts()));
  for (int expert = 0; expert < num_experts(); ++expert) {
    for (Replica replica : replicas(expert)) {
      for (int& rank : replica.shard_ranks) rank = renumbered[rank];
      const bool is_whole = std::find(replica.shard_ranks.begin(), replica.shard_ranks.end(), -1) == replica.shard_ranks.end();
      if (is_whole) left[expert].push_back(std::move(replica));
    }
  }
  const int remaining = static_cast<int>(survivors.size());
  return Placement(std::make_shared<const placement_internal::Table>(
      placement_internal::build_table(remaining, left, placement_internal::Orphans::allowed)));
}

int Placement::num_experts() const { return table_->num_experts; }
int Placement::ranks() const { return table_->ranks; }
int Placement::max_fanout() const { return table_->max_fanout; }
int Placement::max_replicas() const { return table_->max_replicas; }
int Placement::max_local_experts() const { return table_->max_local_experts; }
std::uint64_t Placement::hash() const { return table_->hash; }

std::span<const int> Placement::local_experts(int rank) const {
  check_index("rank", rank, ranks());
  return table_->local_experts[rank];
}

std::span<const Replica> Placement::replicas(int expert) const {
  check_index("expert", expert, num_experts());
  return table_->replicas[expert];
}

std::vector<Instance> Placement::instances() const {
  const placement_internal::TableView view = table_->view();
  std::vector<Instance> result;
  for (int expert = 0; expert < num_experts(); ++expert) {
    const std::vector<Replica>& replicas = table_->replicas[expert];
    for (int replica = 0; replica < std::ssize(replicas); ++replica) {
      const std::uint32_t* shards = view.shards_of(expert, replica);
      for (int shard = 0; shard < std::ssize(replicas[replica].shard_ranks); ++shard) {
        result.push_back(
            {expert, replica, shard, placement_internal::instance_rank(shards[shard]), placement_internal::instance_local(shards[shard])});
      }
    }
  }
  return result;
}

int Placement::replica_for(int expert, int source_rank, std::int64_t token_index) const {
  check_index("expert", expert, num_experts());
  check_index("source_rank", source_rank, ranks());
  return table_->view().replica_for(expert, static_cast<std::uint32_t>(source_rank), static_cast<std::uint32_t>(token_index));
}

}  // namespace tokenyard
