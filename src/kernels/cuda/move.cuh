#pragma once
// What both ways of moving rows share: how a move begins, where a token's rows go, and what is sent and lands beside them.

#include "kernels/cuda/land.cuh"
#include "kernels/cuda/routing.cuh"
#include "kernels/cuda/source.cuh"

namespace tokenyard::cuda {

// A block has two kinds of warps: movers move rows, and behind them clerks see to what is beside the rows.
__device__ inline int movers_of_block() { return warps_of_block() - kClerks; }
__device__ inline bool is_mover() { return warp_index() < movers_of_block(); }
__device__ inline WarpShare mover_share() { return WarpShare::of(0, movers_of_block()); }
__device__ inline WarpShare clerk_share() { return WarpShare::of(movers_of_block(), kClerks); }

// Opens the call of a cached dispatch; behind a plan every rank is known to have begun. Block-uniform.
__device__ inline bool begin_move(const MoveArgs& args) {
  const Context& c = args.context;
  const CallState state = state_of_call(c);
  if (state.failed || !args.cached) return !state.failed;
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

// The records and the scales of this warp's share of the tokens, and the slots for the handle. Not for a cached dispatch, of which only
// scales travel.
__device__ inline void send_beside(const MoveJob& job, const WarpShare& share) {
  const MoveArgs& args = job.args;
  const Context& c = args.context;
  const std::int32_t tokens = tokens_of(args);
  if (args.cached && job.scales.units == 0) return;
  for (auto token = static_cast<std::int32_t>(share.index); token < tokens; token += static_cast<std::int32_t>(share.count)) {
    TokenChoices choices;
    if (!args.cached) choices = choices_of(args.routing, c.rank, token);
    std::int32_t ordinal = 0;
    for (int first = 0; first < c.ranks; first += kLanes) {
      const Targets targets = targets_of(job, token, first);
      move_scales(job, token, targets);
      if (args.cached) continue;
      write_records(args, token, choices, targets, ordinal);
      const int rank = first + lane_index();
      if (rank < c.ranks) args.handle.slots[static_cast<std::int64_t>(token) * c.ranks + rank] = targets.slot;
    }
  }
}

// What a clerk does: everything that is not a row, while others move rows.
__device__ inline void work_beside_rows(const MoveJob& job, const WarpShare& share) {
  send_beside(job, share);
  if (job.args.cached) return;
  publish_records(job.args.context, share.count);
  if (wait_for_records(job.args.context)) land_pairs(job.args, share);
}

}  // namespace tokenyard::cuda
