#pragma once
// Random valid placements for properties: any mix of replicas, shards, shares, and ranks without experts.

#include <rapidcheck.h>

#include <numeric>
#include <random>
#include <vector>

#include "tokenyard/placement.h"

namespace tokenyard::testing {

struct PlacementParts {
  int ranks = 1;
  std::vector<std::vector<Replica>> replicas;
  Placement build() const { return Placement::custom(ranks, replicas); }
};

inline PlacementParts random_parts(std::uint64_t seed, int num_experts, int ranks, int max_shards) {
  std::mt19937_64 random(seed);
  PlacementParts parts{ranks, std::vector<std::vector<Replica>>(static_cast<std::size_t>(num_experts))};
  for (std::vector<Replica>& replicas : parts.replicas) {
    std::vector<int> free_ranks(static_cast<std::size_t>(ranks));
    std::iota(free_ranks.begin(), free_ranks.end(), 0);
    std::shuffle(free_ranks.begin(), free_ranks.end(), random);
    do {
      Replica replica{{}, static_cast<std::uint32_t>(1 + random() % 7)};
      const std::size_t shards = 1 + random() % static_cast<std::uint64_t>(max_shards);
      while (replica.shard_ranks.size() < shards && !free_ranks.empty()) {
        replica.shard_ranks.push_back(free_ranks.back());
        free_ranks.pop_back();
      }
      replicas.push_back(replica);
    } while (!free_ranks.empty() && random() % 2 == 0);
  }
  return parts;
}

inline rc::Gen<PlacementParts> any_parts(int max_shards = 3) {
  return rc::gen::map(rc::gen::tuple(rc::gen::arbitrary<std::uint64_t>(), rc::gen::inRange(1, 12), rc::gen::inRange(1, 9)),
                      [max_shards](const std::tuple<std::uint64_t, int, int>& t) {
                        return random_parts(std::get<0>(t), std::get<1>(t), std::get<2>(t), max_shards);
                      });
}

inline void showValue(const PlacementParts& parts, std::ostream& out) { out << parts.build().to_json(); }

}  // namespace tokenyard::testing
