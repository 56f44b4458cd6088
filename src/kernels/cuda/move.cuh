#pragma once
// What both ways of moving rows share: how a move begins, where a token's rows go, and what is sent and lands beside them.

#include "kernels/cuda/land.cuh"
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/routing.cuh"
#include "kernels/cuda/source.cuh"

namespace tokenyard::cuda {

// A block has two kinds of warps: movers move rows, and behind them clerks see to what is beside the rows.
__device__ inline int movers_of_block() { return warps_of_block() - kClerks; }
__device__ inline Crew clerks() { return {.first = movers_of_block() * kLanes}; }
__device__ inline bool is_mover() { return warp_index() < movers_of_block(); }
__device__ inline WarpShare mover_share() { return WarpShare::of(0, movers_of_block()); }
__device__ inline WarpShare clerk_share() { return WarpShare::of(movers_of_block(), kClerks); }

// Plans, or opens the call of a cached dispatch; behind a plan every rank is known to have begun.
// begin_rows(): by the block, as soon as it holds nothing else up. Block-uniform.
template <class BeginRows>
__device__ inline bool begin_move(const MoveArgs& args, PlanMemory& memory, BeginRows&& begin_rows) {
  const Context& c = args.context;
  if (!args.cached) return plan(args, memory, clerks(), begin_rows);
  begin_rows();
  const CallState state = state_of_call(c);
  if (state.failed) return false;
  const protocol::CallHeader header = complete_header(args.header, args.handle);
  if (blockIdx.x == 0 && !begin_call(c, header, protocol::offer(args.buffer), state)) return false;
  return wait_for_peers(c, header, Phase::dispatch_credit, state.call, blockIdx.x == gridDim.x - 1);
}

// The index of a token's row at `rank`, -1: none.
__device__ inline std::int32_t slot_of(const MoveArgs& args, std::int32_t token, int rank) {
  const std::int64_t ranks = args.context.ranks;
  if (args.cached) return args.handle.slots[token * ranks + rank];
  const std::int32_t number = args.numbers.number[token * ranks + rank];
  const std::int32_t before = args.numbers.before[token / kPlanChunk * ranks + rank];  // all three loaded at once
  const std::int32_t base = args.numbers.base[rank];
  return number < 0 ? -1 : base + before + number;
}

// A token's destinations among 32 ranks, of which each lane has one. Pointers only where `present` has the lane's bit.
struct Targets {
  int first_rank = 0;
  std::int32_t slot = -1;
  unsigned present = 0;
  std::byte* row = nullptr;
  std::byte* scales = nullptr;
  std::byte* record = nullptr;
};

__device__ inline Targets targets_of(const MoveJob& job, std::int32_t token, int first_rank) {
  const Context& c = job.args.context;
  const int rank = first_rank + lane_index();
  const std::int32_t slot = rank < c.ranks ? slot_of(job.args, token, rank) : -1;
  Targets targets;
  targets.first_rank = first_rank;
  targets.slot = slot;
  targets.present = __ballot_sync(kAllLanes, slot >= 0);
  if (slot < 0) return targets;
  const int buffer = buffer_of(c, rank, job.args.buffer);
  targets.row = receive_rows(c, rank, buffer) + slot * job.args.source.row_bytes;
  targets.scales = receive_scales(c, rank, buffer) + slot * job.scales.row_bytes;
  targets.record = receive_records(c, rank, buffer) + slot * c.shape.record_bytes();
  return targets;
}

// Visits the lanes of `present`, first those from `start` on: at any time rows leave for all ranks, and the ranks begin with
// different peers.
template <class Visit>
__device__ inline void for_each_lane(unsigned present, int start, Visit&& visit) {
  const unsigned from_start = kAllLanes << start;
  for (unsigned left = present & from_start; left != 0; left &= left - 1) visit(__ffs(left) - 1);
  for (unsigned left = present & ~from_start; left != 0; left &= left - 1) visit(__ffs(left) - 1);
}
__device__ inline int start_lane(const Context& c, std::int32_t token, int first_rank) {
  return (c.rank + 1 + token) % min(kLanes, c.ranks - first_rank);
}

template <class Pointer>
__device__ inline Pointer* of_lane(Pointer* pointer, int lane) {
  return reinterpret_cast<Pointer*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(pointer), lane));
}

// The scales of a token as the caller has them, to all targets. By one warp.
__device__ inline void move_scales(const MoveJob& job, std::int32_t token, const Targets& targets) {
  for (int begin = 0; begin < job.scales.units; begin += kLanes) {
    const int unit = begin + lane_index();
    const bool mine = unit < job.scales.units;
    const int4 value = mine ? load_scale_unit(job, token, unit) : int4{};
    for_each_lane(targets.present, 0, [&](int lane) {
      std::byte* to = of_lane(targets.scales, lane);
      if (mine) store_unit(to + static_cast<std::int64_t>(unit) * job.scales.width, value, job.scales.width);
    });
  }
}

// Words of quantised scales, staged in shared memory, to `offset` bytes behind the first of all targets. By one warp.
__device__ inline void move_staged_scales(const Targets& targets, const std::byte* stage, int words, int offset) {
  for_each_lane(targets.present, 0, [&](int lane) {
    std::byte* to = of_lane(targets.scales, lane) + offset;
    for (int word = lane_index(); word < words; word += kLanes) {
      reinterpret_cast<std::uint32_t*>(to)[word] = reinterpret_cast<const std::uint32_t*>(stage)[word];
    }
  });
}

// The records of a token for all targets; `ordinal` counts its destinations so far that are other ranks. By one warp.
__device__ inline void write_records(const MoveArgs& args, std::int32_t token, const TokenChoices& choices, const Targets& targets,
                                     std::int32_t& ordinal) {
  const Context& c = args.context;
  const auto first_partial = static_cast<std::int32_t>(token * c.shape.partials_per_token());
  for_each_lane(targets.present, 0, [&](int lane) {
    const int rank = targets.first_rank + lane;
    const RecordHead head{token, rank == c.rank ? -1 : first_partial + ordinal};
    if (rank != c.rank) ++ordinal;
    write_record(of_lane(targets.record, lane), head, choices, local_ids_at(args.routing, choices, rank), args.routing.top_k);
  });
}

// The records of this warp's share of the tokens, and their slots for the handle.
__device__ inline void send_records(const MoveJob& job, const WarpShare& share) {
  const MoveArgs& args = job.args;
  const Context& c = args.context;
  const std::int32_t tokens = args.routing.num_tokens;
  for (auto token = static_cast<std::int32_t>(share.index); token < tokens; token += static_cast<std::int32_t>(share.count)) {
    const TokenChoices choices = choices_of(args.routing, c.rank, token);
    std::int32_t ordinal = 0;
    for (int first = 0; first < c.ranks; first += kLanes) {
      const Targets targets = targets_of(job, token, first);
      write_records(args, token, choices, targets, ordinal);
      const int rank = first + lane_index();
      if (rank < c.ranks) args.handle.slots[static_cast<std::int64_t>(token) * c.ranks + rank] = targets.slot;
    }
  }
}
__device__ inline void send_scales(const MoveJob& job, const WarpShare& share) {
  const std::int32_t tokens = tokens_of(job.args);
  for (auto token = static_cast<std::int32_t>(share.index); token < tokens; token += static_cast<std::int32_t>(share.count)) {
    for (int first = 0; first < job.args.context.ranks; first += kLanes) move_scales(job, token, targets_of(job, token, first));
  }
}

// Where there is little of each token, a warp sends for several at once: each asks memory for this and then for that, and while rows
// saturate the links an answer takes its time. Every kFew lanes have a token; lane l of them has rank l and position l of its records.
constexpr int kFew = 8;
__device__ inline bool has_small_records(const MoveArgs& args) { return args.context.ranks <= kFew && args.handle.top_k <= kFew; }

__device__ inline void send_small_records(const MoveArgs& args, const WarpShare& share) {
  const Context& c = args.context;
  const RoutingArgs& routing = args.routing;
  const int of_token = lane_index() / kFew, l = lane_index() % kFew;
  constexpr int kTokens = kLanes / kFew;
  for (std::int64_t first = share.index * kTokens; first < routing.num_tokens; first += share.count * kTokens) {
    const auto token = static_cast<std::int32_t>(first) + of_token;
    Choice choice;
    std::byte* record = nullptr;
    if (token < routing.num_tokens && l < routing.top_k) choice = choice_of(routing, c.rank, token, l);
    if (token < routing.num_tokens && l < c.ranks) {
      const std::int32_t slot = slot_of(args, token, l);
      args.handle.slots[static_cast<std::int64_t>(token) * c.ranks + l] = slot;
      if (slot >= 0) record = receive_records(c, l, buffer_of(c, l, args.buffer)) + slot * c.shape.record_bytes();
    }
    auto partial = static_cast<std::int32_t>(token * c.shape.partials_per_token());
    for (int rank = 0; rank < c.ranks; ++rank) {
      const protocol::Record to{of_lane(record, of_token * kFew + rank), routing.top_k};
      if (to.bytes == nullptr) continue;
      const bool is_own = rank == c.rank;
      if (l == 0) {
        to.source_token() = token;
        to.partial_slot() = is_own ? -1 : partial;
      }
      if (l < routing.top_k) {
        to.local_ids()[l] = choice.local_at(rank, routing.table.max_fanout);
        to.weights()[l] = choice.weight;
      }
      if (!is_own) ++partial;
    }
  }
}

// The same for scales: every kFewUnits lanes have a token, lane l of them rank l and unit l.
constexpr int kFewUnits = 16;
__device__ inline bool has_small_scales(const MoveJob& job) { return job.args.context.ranks <= kFewUnits && job.scales.units <= kFewUnits; }

__device__ inline void send_small_scales(const MoveJob& job, const WarpShare& share) {
  const MoveArgs& args = job.args;
  const Context& c = args.context;
  const int of_token = lane_index() / kFewUnits, l = lane_index() % kFewUnits;
  const std::int32_t tokens = tokens_of(args);
  constexpr int kTokens = kLanes / kFewUnits;
  for (std::int64_t first = share.index * kTokens; first < tokens; first += share.count * kTokens) {
    const auto token = static_cast<std::int32_t>(first) + of_token;
    const bool has_unit = token < tokens && l < job.scales.units;
    const int4 unit = has_unit ? load_scale_unit(job, token, l) : int4{};
    const std::int32_t slot = token < tokens && l < c.ranks ? slot_of(args, token, l) : -1;
    std::byte* scales = nullptr;
    if (slot >= 0) scales = receive_scales(c, l, buffer_of(c, l, args.buffer)) + slot * job.scales.row_bytes;
    for (int rank = 0; rank < c.ranks; ++rank) {
      std::byte* const to = of_lane(scales, of_token * kFewUnits + rank);
      if (to != nullptr && has_unit) store_unit(to + l * job.scales.width, unit, job.scales.width);
    }
  }
}

// What a clerk does: everything that is not a row, while others move rows. Records first: the receiver has more to do with them.
__device__ inline void work_beside_rows(const MoveJob& job, const WarpShare& share) {
  const MoveArgs& args = job.args;
  if (!args.cached) {
    has_small_records(args) ? send_small_records(args, share) : send_records(job, share);
    publish_records(args.context, share.count);
  }
  if (job.scales.units != 0) has_small_scales(job) ? send_small_scales(job, share) : send_scales(job, share);
  if (args.cached) return;
  if (wait_for_records(args.context)) land_pairs(args, share);
}

}  // namespace tokenyard::cuda
