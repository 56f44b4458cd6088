#pragma once
// The dense table that kernels read: no policy, only numbers.

#include <cstdint>
#include <vector>

#include "protocol/host_device.h"
#include "tokenyard/placement.h"

namespace tokenyard::placement_internal {

constexpr std::uint32_t kNoInstance = 0xffffffffU;

constexpr TY_HOST_DEVICE std::uint32_t pack_instance(std::uint32_t rank, std::uint32_t local) { return rank << 16 | local; }
constexpr TY_HOST_DEVICE int instance_rank(std::uint32_t packed) { return static_cast<int>(packed >> 16); }
constexpr TY_HOST_DEVICE int instance_local(std::uint32_t packed) { return static_cast<int>(packed & 0xffffU); }

// The fixed 32-bit mix that chooses a replica (the finaliser of MurmurHash3 over both words).
constexpr TY_HOST_DEVICE std::uint32_t mix(std::uint32_t source_rank, std::uint32_t token_index) {
  std::uint32_t h = token_index + 0x9e3779b9U * (source_rank + 1);
  h ^= h >> 16;
  h *= 0x85ebca6bU;
  h ^= h >> 13;
  h *= 0xc2b2ae35U;
  h ^= h >> 16;
  return h;
}

// Trivially copyable; what kernels take by value. instances: [num_experts][max_replicas][max_fanout] packed, kNoInstance
// where there is none; share_ends: [num_experts][max_replicas] running sums of shares (the last one repeats; 0 without a replica).
struct TableView {
  const std::uint32_t* instances = nullptr;
  const std::uint32_t* share_ends = nullptr;
  int num_experts = 0;
  int max_replicas = 0;
  int max_fanout = 0;

  constexpr TY_HOST_DEVICE int replica_for(int expert, std::uint32_t source_rank, std::uint32_t token_index) const {
    if (max_replicas == 1) return 0;
    const std::uint32_t* ends = share_ends + static_cast<std::int64_t>(expert) * max_replicas;
    const std::uint32_t shares = ends[max_replicas - 1];
    if (shares == 0) return 0;  // an expert whose ranks were lost: its first replica has no instance
    const std::uint32_t ticket = mix(source_rank, token_index) % shares;
    int replica = 0;
    while (ticket >= ends[replica]) ++replica;
    return replica;
  }
  // The max_fanout packed instances (ascending shard, kNoInstance behind the last) of the chosen replica.
  constexpr TY_HOST_DEVICE const std::uint32_t* shards_of(int expert, int replica) const {
    return instances + (static_cast<std::int64_t>(expert) * max_replicas + replica) * max_fanout;
  }
};

struct Table {
  int num_experts = 0;
  int ranks = 0;
  int max_fanout = 1;
  int max_replicas = 1;
  int max_local_experts = 0;
  std::uint64_t hash = 0;
  std::vector<std::vector<Replica>> replicas;
  std::vector<std::vector<int>> local_experts;  // per rank, ascending
  std::vector<std::uint32_t> instances;
  std::vector<std::uint32_t> share_ends;

  TableView view() const { return {instances.data(), share_ends.data(), num_experts, max_replicas, max_fanout}; }
};

}  // namespace tokenyard::placement_internal
