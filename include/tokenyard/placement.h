#pragma once
// Placement: which rank holds which expert. The only place that knows about EP, TP shards and replicas.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tokenyard {

// One copy of an expert: the ranks that hold its TP shards 0..tp-1, and its integer share of the expert's tokens.
struct Replica {
  std::vector<int> shard_ranks;
  std::uint32_t share = 1;
};

struct Instance {
  int expert = 0;
  int replica = 0;
  int shard = 0;
  int rank = 0;
  int local_index = 0;  // position among the rank's local experts, ascending logical id
};

struct UniformOptions {
  bool require_equal_windows = false;  // UsageError unless num_experts is a multiple of ranks
};

struct ReplicatedOptions {
  int ranks_per_node = 0;  // 0: one node. Replicas are packed over nodes first, then over the ranks of a node
};

namespace placement_internal {
struct Table;
}

// Immutable; copies are cheap and share the table. Limits: ranks and local experts per rank < 65536, experts <= 65536.
class Placement {
 public:
  // Contiguous windows; the first num_experts % ranks ranks own one more. ranks > num_experts leaves ranks without experts.
  static Placement uniform(int num_experts, int ranks, const UniformOptions& options = {});
  // Uniform windows over ep; shard t of an expert of window w is on rank w * tp + t. A token goes to all tp shards.
  static Placement tensor_parallel(int num_experts, int ep, int tp);
  // The heaviest experts get `redundant` extra replicas in total; all are packed over ranks to even the load. load: [num_experts], >= 0.
  static Placement replicated(int num_experts, int ranks, std::span<const double> load, int redundant,
                              const ReplicatedOptions& options = {});
  // replicas[e]: the replicas of expert e. Every expert has at least one; all replicas of all experts may differ in their
  // number of shards; no rank holds two instances of one expert; shares are in 1..65535.
  static Placement custom(int ranks, const std::vector<std::vector<Replica>>& replicas);
  // {"ranks": R, "experts": [[{"ranks": [0, 1], "share": 1}, ...], ...]}; UsageError names the place of a fault.
  static Placement from_json(std::string_view text);
  std::string to_json() const;
  // What is left when only `survivors` (ascending) remain, renumbered in that order: a replica that lost a shard goes. An
  // expert may be left without any; its tokens then go nowhere, and are counted (ExchangeStatus::lost_ids).
  Placement restricted_to(std::span<const int> survivors) const;

  int num_experts() const;
  int ranks() const;
  int max_fanout() const;  // most shards of any replica: the ranks one (token, k) is sent to
  int max_replicas() const;
  int max_local_experts() const;
  std::span<const int> local_experts(int rank) const;  // ascending logical ids
  std::span<const Replica> replicas(int expert) const;
  std::vector<Instance> instances() const;  // ordered by (expert, replica, shard)
  // Equal placements, and only they, have equal hashes on every machine (up to 64-bit collisions).
  std::uint64_t hash() const;
  // The replica that serves `token_index` of `source_rank`: a fixed 32-bit mix over the replicas' shares.
  int replica_for(int expert, int source_rank, std::int64_t token_index) const;

  const placement_internal::Table& table() const { return *table_; }

 private:
  explicit Placement(std::shared_ptr<const placement_internal::Table> table) : table_(std::move(table)) {}
  std::shared_ptr<const placement_internal::Table> table_;
};

// One shard of one expert's weights that has to travel when a placement replaces another; from_rank is a rank that holds it
// in the old placement (one that stays nearest: the same rank never moves to itself).
struct Move {
  int expert = 0;
  int shard = 0;
  int from_rank = 0;
  int to_rank = 0;
  bool operator==(const Move&) const = default;
};
// UsageError when the placements differ in num_experts, or an expert's shard count differs (weights would have to be recut).
std::vector<Move> moves(const Placement& from, const Placement& to);

}  // namespace tokenyard
