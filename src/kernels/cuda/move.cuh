#pragma once
// What both ways of moving rows share: how a move begins, where a token's rows go, and what is sent and lands beside them.

#include "kernels/cuda/land.cuh"
#include "kernels/cuda/routing.cuh"
#include "kernels/cuda/source.cuh"

namespace tokenyard::cuda {

// Opens the call of a cached dispatch; behind a plan every rank is known to have begun. Block-uniform.
__device__ inline bool begin_move(const MoveArgs& args) {
  const Context& c = args.context;
  if (block_has_failed(c)) return false;
  if (!args.cached) return true;
  const protocol::CallHeader header = complete_header(args.header, args.handle);
  if (blockIdx.x == 0 && !begin_call(c, header, protocol::offer(args.buffer))) return false;
  return wait_for_peers(c, header, Phase::dispatch_credit);
}

__device__ inline std::int32_t tokens_of(const MoveArgs& args) {
  return args.cached ? args.handle.header->num_tokens : args.routing.num_tokens;
}

// A token's destinations among 32 ranks, of which each lane has one. Pointers only where `present` has the lane's bit.
struct Targets {
  int first_rank = 0;
  unsigned present = 0;
  std::byte* row = nullptr;
  std::byte* scales = nullptr;
  std::byte* record = nullptr;
};

__device__ inline Targets targets_of(const MoveJob& job, std::int32_t token, int first_rank) {
  const Context& c = job.args.context;
  const int rank = first_rank + lane_index();
  const std::int32_t slot = rank < c.ranks ? job.args.handle.slots[static_cast<std::int64_t>(token) * c.ranks + rank] : -1;
  Targets targets;
  targets.first_rank = first_rank;
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

// What a warp does beside its rows: sends scales and records of its share of the tokens, and lands its share of what arrives.
class BesideRows {
 public:
  __device__ explicit BesideRows(const MoveJob& job) : job_(job) {}
  // While a row is under way.
  __device__ void go_on() {
    if (!has_sent_) {
      send();
    } else if (!has_landed_ && !job_.args.cached && records_are_here(job_.args.context)) {
      land();
    }
  }
  __device__ void finish() {
    if (!has_sent_) send();
    if (!has_landed_ && !job_.args.cached && wait_for_records(job_.args.context)) land();
  }

 private:
  __device__ void send() {
    has_sent_ = true;
    const Context& c = job_.args.context;
    const std::int32_t tokens = tokens_of(job_.args);
    if (job_.args.cached && job_.scales.units == 0) return;
    for (auto token = static_cast<std::int32_t>(grid_warp()); token < tokens; token += static_cast<std::int32_t>(grid_warps())) {
      TokenChoices choices;
      if (!job_.args.cached) choices = choices_of(job_.args.routing, c.rank, token);
      std::int32_t ordinal = 0;
      for (int first = 0; first < c.ranks; first += kLanes) {
        const Targets targets = targets_of(job_, token, first);
        move_scales(job_, token, targets);
        if (!job_.args.cached) write_records(job_.args, token, choices, targets, ordinal);
      }
    }
    if (!job_.args.cached) publish_records(c);
  }
  __device__ void land() {
    has_landed_ = true;
    land_pairs(job_.args);
  }

  const MoveJob& job_;
  bool has_sent_ = false;
  bool has_landed_ = false;
};

}  // namespace tokenyard::cuda
