#include "placement/build.h"

#include <algorithm>

#include "core/usage.h"

namespace tokenyard::placement_internal {
namespace {

// The instance that a rank was last seen to hold.
struct Holding {
  int expert = -1;
  int replica = 0;
  int shard = 0;
};

void check_replica(int expert, int replica, const Replica& value) {
  if (value.shard_ranks.empty()) {
    usage_error("expert {}, replica {} has no shard; name the ranks of its shards, one rank for an uncut expert", expert, replica);
  }
  if (value.share < 1 || value.share > kMaxShare) {
    usage_error("expert {}, replica {}: share = {}; a share is in 1..{}", expert, replica, value.share, kMaxShare);
  }
}

void check_expert(int expert, const std::vector<Replica>& replicas, std::vector<Holding>& holdings) {
  const int ranks = static_cast<int>(holdings.size());
  for (int replica = 0; replica < std::ssize(replicas); ++replica) {
    check_replica(expert, replica, replicas[replica]);
    const std::vector<int>& shard_ranks = replicas[replica].shard_ranks;
    for (int shard = 0; shard < std::ssize(shard_ranks); ++shard) {
      const int rank = shard_ranks[shard];
      if (rank < 0 || rank >= ranks) {
        usage_error("expert {}, replica {}, shard {}: rank = {}; with ranks = {} a rank is in 0..{}", expert, replica, shard, rank, ranks,
                    ranks - 1);
      }
      Holding& held = holdings[rank];
      if (held.expert == expert) {
        usage_error("expert {}: rank {} holds replica {} shard {} and replica {} shard {}; give each instance of an expert its own rank",
                    expert, rank, held.replica, held.shard, replica, shard);
      }
      held = {expert, replica, shard};
    }
  }
}

void check_table_size(const Table& table) {
  const std::int64_t entries = static_cast<std::int64_t>(table.num_experts) * table.max_replicas * table.max_fanout;
  if (entries > kMaxTableEntries) {
    usage_error(
        "the placement's table needs {} experts x {} replicas x {} shards = {} entries; at most {} are possible: "
        "use fewer replicas or shards per expert",
        table.num_experts, table.max_replicas, table.max_fanout, entries, kMaxTableEntries);
  }
}

void number_local_experts(Table& table) {
  table.local_experts.resize(static_cast<std::size_t>(table.ranks));
  for (int expert = 0; expert < table.num_experts; ++expert) {
    for (const Replica& replica : table.replicas[expert]) {
      for (const int rank : replica.shard_ranks) table.local_experts[rank].push_back(expert);
    }
  }
  for (int rank = 0; rank < table.ranks; ++rank) {
    const auto count = std::ssize(table.local_experts[rank]);
    if (count > kMaxLocalExperts) {
      usage_error("rank {} holds {} experts; at most {} are possible: use more ranks", rank, count, kMaxLocalExperts);
    }
    table.max_local_experts = std::max(table.max_local_experts, static_cast<int>(count));
  }
}

void flatten(Table& table) {
  const std::size_t rows = static_cast<std::size_t>(table.num_experts) * table.max_replicas;
  table.instances.assign(rows * table.max_fanout, kNoInstance);
  table.share_ends.assign(rows, 0);
  std::vector<std::uint32_t> next_local(static_cast<std::size_t>(table.ranks), 0);
  for (int expert = 0; expert < table.num_experts; ++expert) {
    const std::vector<Replica>& replicas = table.replicas[expert];
    std::uint32_t end = 0;
    for (int replica = 0; replica < table.max_replicas; ++replica) {
      const std::size_t row = static_cast<std::size_t>(expert) * table.max_replicas + replica;
      if (replica < std::ssize(replicas)) {
        std::uint32_t* out = &table.instances[row * table.max_fanout];
        for (const int rank : replicas[replica].shard_ranks) *out++ = pack_instance(rank, next_local[rank]++);
        end += replicas[replica].share;  // at most 65535 replicas of 65535: fits
      }
      table.share_ends[row] = end;
    }
  }
}

// Each step is a bijection of the state for a given word, so lists of one length that differ in one word never collide.
// The constants are those of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators").
class Hash {
 public:
  void add(std::uint64_t word) {
    state_ = (state_ ^ word) + 0x9e3779b97f4a7c15U;
    state_ = (state_ ^ (state_ >> 30)) * 0xbf58476d1ce4e5b9U;
    state_ = (state_ ^ (state_ >> 27)) * 0x94d049bb133111ebU;
    state_ ^= state_ >> 31;
  }
  std::uint64_t value() const { return state_; }

 private:
  std::uint64_t state_ = 0;
};

// Lengths come before contents, so no two placements feed the same words.
std::uint64_t hash_of(const Table& table) {
  Hash hash;
  hash.add(static_cast<std::uint64_t>(table.ranks));
  hash.add(static_cast<std::uint64_t>(table.num_experts));
  for (const std::vector<Replica>& replicas : table.replicas) {
    hash.add(replicas.size());
    for (const Replica& replica : replicas) {
      hash.add(replica.share);
      hash.add(replica.shard_ranks.size());
      for (const int rank : replica.shard_ranks) hash.add(static_cast<std::uint64_t>(rank));
    }
  }
  return hash.value();
}

}  // namespace

void check_sizes(std::int64_t num_experts, std::int64_t ranks) {
  if (ranks < 1 || ranks > kMaxRanks) usage_error("ranks = {}; a placement has 1..{} ranks", ranks, kMaxRanks);
  if (num_experts < 1 || num_experts > kMaxExperts) {
    usage_error("num_experts = {}; a placement has 1..{} experts", num_experts, kMaxExperts);
  }
}

Table build_table(int ranks, const std::vector<std::vector<Replica>>& replicas, Orphans orphans) {
  check_sizes(std::ssize(replicas), ranks);
  std::vector<Holding> holdings(static_cast<std::size_t>(ranks));
  for (int expert = 0; expert < std::ssize(replicas); ++expert) {
    if (replicas[expert].empty() && orphans == Orphans::refused) {
      usage_error("expert {} has no replica; every expert needs at least one", expert);
    }
    check_expert(expert, replicas[expert], holdings);
  }

  Table table;
  table.num_experts = static_cast<int>(replicas.size());
  table.ranks = ranks;
  for (const std::vector<Replica>& of_expert : replicas) {
    table.max_replicas = std::max(table.max_replicas, static_cast<int>(of_expert.size()));
    for (const Replica& replica : of_expert) table.max_fanout = std::max(table.max_fanout, static_cast<int>(replica.shard_ranks.size()));
  }
  check_table_size(table);
  table.replicas = replicas;
  number_local_experts(table);
  flatten(table);
  table.hash = hash_of(table);
  return table;
}

}  // namespace tokenyard::placement_internal
