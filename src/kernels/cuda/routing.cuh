#pragma once
// What a token asks for: ids, weights and the placement's table, per (token, k); and the records that tell the receiver.

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/kernels.h"
#include "protocol/record.h"

namespace tokenyard::cuda {

using placement_internal::kNoInstance;

__device__ inline std::int64_t id_at(const RoutingArgs& routing, std::int32_t token, int k) {
  const std::byte* at = routing.ids.data + token * routing.ids.row_stride + k * routing.ids.column_stride;
  return routing.wide_ids ? *reinterpret_cast<const std::int64_t*>(at) : *reinterpret_cast<const std::int32_t*>(at);
}

__device__ inline float weight_at(const RoutingArgs& routing, std::int32_t token, int k) {
  if (routing.weights.data == nullptr) return 1.0F;
  return *reinterpret_cast<const float*>(routing.weights.data + token * routing.weights.row_stride + k * routing.weights.column_stride);
}

// The instances of the replica that serves (token, k), ascending shards; null: no expert, or an id outside of the table.
__device__ inline const std::uint32_t* shards_for(const RoutingArgs& routing, int rank, std::int32_t token, std::int64_t expert) {
  if (expert < 0 || expert >= routing.table.num_experts) return nullptr;
  const std::uint32_t ticket = static_cast<std::uint32_t>(token) + routing.token_base;
  const int replica = routing.table.replica_for(static_cast<int>(expert), static_cast<std::uint32_t>(rank), ticket);
  return routing.table.shards_of(static_cast<int>(expert), replica);
}

// Ids that lead nowhere.
struct IdCounts {
  unsigned invalid = 0;  // outside of the table
  unsigned lost = 0;     // experts without an instance
  bool refused = false;  // an id or a weight has made the call fail
};

// What there is to say about the id of (token, k), and about its weight when that is asked for. An exchange that has failed already says
// no more.
__device__ inline void check_id(const Context& c, const RoutingArgs& routing, std::int32_t token, int k, std::int64_t expert,
                                IdCounts& counts) {
  if (expert >= routing.table.num_experts) {
    ++counts.invalid;
    if (routing.validate) {
      if (!has_failed(c)) fail(c, FailureKind::mismatch, Phase::dispatch_counts, c.rank, routing.table.num_experts, expert);
      counts.refused = true;
    }
  }
  if (routing.validate && !isfinite(weight_at(routing, token, k))) {
    if (!has_failed(c)) fail(c, FailureKind::mismatch, Phase::dispatch_counts, c.rank, kNotFinite, token);
    counts.refused = true;
  }
}

// Kernels add ids up in tickets, which they leave at zero.
enum IdTicket { kInvalidTicket = protocol::kTickets - 2, kLostTicket };
__device__ inline void add_id_counts(const Context& c, const IdCounts& counts) {
  if (counts.invalid != 0) atomicAdd(&c.tickets[kInvalidTicket], counts.invalid);
  if (counts.lost != 0) atomicAdd(&c.tickets[kLostTicket], counts.lost);
}
// By one thread of the last block: into the header and the state of the exchange.
__device__ inline void take_id_counts(const Context& c, HandleView::Header& header) {
  const std::uint32_t invalid = c.tickets[kInvalidTicket], lost = c.tickets[kLostTicket];
  header.invalid_ids = static_cast<std::int32_t>(invalid);
  header.lost_ids = static_cast<std::int32_t>(lost);
  if (invalid != 0) c.state->invalid_ids += invalid;
  if (lost != 0) c.state->lost_ids += lost;
}
__device__ inline void reset_id_counts(const Context& c) { c.tickets[kInvalidTicket] = c.tickets[kLostTicket] = 0; }

// One top-k position of a token.
struct Choice {
  const std::uint32_t* shards = nullptr;
  std::uint32_t first = kNoInstance;  // of shards
  float weight = 0.0F;

  // The local expert that serves it on `rank`, or -1.
  __device__ std::int32_t local_at(int rank, int max_fanout) const {
    if (first == kNoInstance) return -1;
    if (placement_internal::instance_rank(first) == rank) return placement_internal::instance_local(first);
    for (int shard = 1; shard < max_fanout && shards[shard] != kNoInstance; ++shard) {
      if (placement_internal::instance_rank(shards[shard]) == rank) return placement_internal::instance_local(shards[shard]);
    }
    return -1;
  }
};

__device__ inline Choice choice_of(const RoutingArgs& routing, int rank, std::int32_t token, int k) {
  Choice choice;
  choice.weight = weight_at(routing, token, k);
  choice.shards = shards_for(routing, rank, token, id_at(routing, token, k));
  if (choice.shards != nullptr) choice.first = choice.shards[0];
  return choice;
}

// All positions of a token, spread over a warp: lane l has k = l and k = l + 32.
struct TokenChoices {
  Choice of[2];
};

__device__ inline TokenChoices choices_of(const RoutingArgs& routing, int rank, std::int32_t token) {
  TokenChoices choices;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int k = lane_index() + half * kLanes;
    if (k < routing.top_k) choices.of[half] = choice_of(routing, rank, token, k);
  }
  return choices;
}

// The local ids of one (token, rank), spread alike.
struct LocalIds {
  std::int32_t of[2] = {-1, -1};
};

__device__ inline LocalIds local_ids_at(const RoutingArgs& routing, const TokenChoices& choices, int rank) {
  LocalIds ids;
  ids.of[0] = choices.of[0].local_at(rank, routing.table.max_fanout);
  if (routing.top_k > kLanes) ids.of[1] = choices.of[1].local_at(rank, routing.table.max_fanout);
  return ids;
}

// The top-k positions that have a local id. By a whole warp.
__device__ inline std::uint64_t k_mask_of(const LocalIds& ids) {
  const std::uint64_t low = __ballot_sync(kAllLanes, ids.of[0] >= 0);
  const std::uint64_t high = __ballot_sync(kAllLanes, ids.of[1] >= 0);
  return high << kLanes | low;
}

struct RecordHead {
  std::int32_t source_token = -1;
  std::int32_t partial_slot = -1;
};

// Writes a record (protocol::Record) by a whole warp, consecutive words from consecutive lanes: over a link it is then one
// or two packets.
__device__ inline void write_record(std::byte* record, RecordHead head, const TokenChoices& choices, const LocalIds& ids, int top_k) {
  const int words = 2 + 2 * top_k;
  for (int begin = 0; begin < words; begin += kLanes) {
    const int word = begin + lane_index();
    const bool is_weight = word >= 2 + top_k;
    const int k = word - 2 - (is_weight ? top_k : 0);
    const int lane = k & (kLanes - 1);  // the two head words have k < 0: what they ask for is not used
    std::int32_t id = __shfl_sync(kAllLanes, ids.of[0], lane);
    float weight = __shfl_sync(kAllLanes, choices.of[0].weight, lane);
    if (top_k > kLanes) {
      const std::int32_t high_id = __shfl_sync(kAllLanes, ids.of[1], lane);
      const float high_weight = __shfl_sync(kAllLanes, choices.of[1].weight, lane);
      if (k >= kLanes) {
        id = high_id;
        weight = high_weight;
      }
    }
    std::int32_t value = is_weight ? __float_as_int(weight) : id;
    if (word == 0) value = head.source_token;
    if (word == 1) value = head.partial_slot;
    if (word < words) reinterpret_cast<std::int32_t*>(record)[word] = value;
  }
}

}  // namespace tokenyard::cuda
