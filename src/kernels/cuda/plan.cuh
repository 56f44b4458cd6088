#pragma once
// Who gets what, and where: the last block that has counted exchanges counts with all ranks. It is how a move begins.

#include "kernels/cuda/count.cuh"
#include "protocol/overflow.h"

namespace tokenyard::cuda {

using protocol::ExpertTally;
using protocol::Overflow;

// Counts are exchanged by threads from the middle of the block on: its first warps have something else to do meanwhile.
__device__ inline int count_thread() { return static_cast<int>((threadIdx.x + blockDim.x / 2) % blockDim.x); }

// Where the last block adds counts up.
__device__ inline std::int32_t* sums_of(const PlanArgs& args, PlanMemory& memory) {
  return has_few_counts(args.context) ? memory.counts : args.counts;
}

// This rank's row of the count matrix, to everybody; first_count: of this thread's first word.
__device__ inline void publish_counts(const PlanArgs& args, std::uint64_t call, std::int32_t first_count) {
  const Context& c = args.context;
  const int words = static_cast<int>(c.shape.count_words());
  for (int word = count_thread(); word < words; word += blockDim.x) {
    const std::uint64_t count = protocol::count_word(call, word == count_thread() ? first_count : args.counts[word]);
    for (int i = 0; i < c.ranks; ++i) ptx::store_relaxed(&count_row(c, (c.rank + 1 + i) % c.ranks, c.rank, call)[word], count);
  }
}

// Rows of earlier chunks. By all warps.
__device__ inline void scan_chunks(const PlanArgs& args) {
  const Context& c = args.context;
  const int chunks = (args.routing.num_tokens + kPlanChunk - 1) / kPlanChunk;
  for (int rank = warp_index(); rank < c.ranks; rank += warps_of_block()) {
    exclusive_scan_column(args.numbers.before + rank, c.ranks, chunks);
  }
}

// A count that was not there at first. 0: the call has failed.
__device__ inline std::uint64_t await_count(const Context& c, int source, int word, std::uint64_t call) {
  return await(c, &count_row(c, c.rank, source, call)[word], {.peer = source, .phase = Phase::dispatch_counts, .call = call},
               [call](std::uint64_t seen) { return protocol::is_count_of(seen, call); });
}

// Waits for all ranks' counts: sums becomes the sum over all, and numbers.base what lower ranks send. In each thread; false: the call
// has failed. fits: as far as this thread knows every rank has room for its rows.
__device__ inline bool sum_counts(const PlanArgs& args, std::uint64_t call, std::int32_t* sums, bool& fits) {
  const Context& c = args.context;
  constexpr int kAtOnce = 4;  // loads under way
  bool good = true;
  for (int word = count_thread(); word < c.shape.count_words(); word += blockDim.x) {
    std::int32_t sum = 0, base = 0;
    for (int first = 0; first < c.ranks; first += kAtOnce) {
      std::uint64_t seen[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        seen[i] = first + i < c.ranks ? ptx::load_relaxed(&count_row(c, c.rank, first + i, call)[word]) : protocol::count_word(call, 0);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (!protocol::is_count_of(seen[i], call)) good = (seen[i] = await_count(c, first + i, word, call)) != 0 && good;
        if (first + i == c.rank) base = sum;
        sum += protocol::count_in(seen[i]);
      }
    }
    sums[word] = sum;
    if (word >= c.ranks) continue;
    args.numbers.base[word] = base;
    fits = fits && sum <= c.shape.receive_rows;
  }
  return good;
}

__device__ inline ExpertTally tally_experts(const PlanArgs& args, const protocol::CountLimits& limits, const std::int32_t* sums, int rank) {
  const Context& c = args.context;
  ExpertTally tally;
  for (int local = lane_index(); local < c.shape.max_local_experts; local += kLanes) {
    tally.add(limits, local, sums[c.shape.instance_word(rank, local)]);
  }
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    ExpertTally other;
    other.pairs = __shfl_xor_sync(kAllLanes, tally.pairs, distance);
    other.layout_rows = __shfl_xor_sync(kAllLanes, tally.layout_rows, distance);
    other.excess_local = __shfl_xor_sync(kAllLanes, tally.excess_local, distance);
    other.excess_count = __shfl_xor_sync(kAllLanes, tally.excess_count, distance);
    tally.merge(other);
  }
  return tally;
}

// From the sums, which every rank has: the same decision everywhere, so that all fail alike. One rank per warp. Block-uniform, behind a
// barrier.
__device__ inline bool everything_fits(const PlanArgs& args, const std::int32_t* sums, PlanMemory& memory) {
  const Context& c = args.context;
  const protocol::CountLimits limits{.receive_rows = c.shape.receive_rows,
                                     .expert_capacity = args.limits.expert_capacity,
                                     .max_layout_rows = args.limits.max_layout_rows,
                                     .alignment = args.limits.alignment,
                                     .drop = args.limits.drop,
                                     .expert_layout = args.limits.expert_layout};
  Overflow mine;
  int mine_rank = -1;
  for (int rank = warp_index(); rank < c.ranks; rank += warps_of_block()) {
    ExpertTally tally;  // costs a microsecond: only where it is asked for
    if (limits.expert_layout || (rank == c.rank && args.host != nullptr)) tally = tally_experts(args, limits, sums, rank);
    const Overflow found = protocol::find_overflow(limits, sums[rank], tally);
    if (rank == c.rank && lane_index() == 0) {
      memory.layout_rows = limits.expert_layout ? tally.layout_rows : sums[rank];
      memory.pairs = tally.pairs;
    }
    if (found.excess == protocol::Excess::none || mine_rank >= 0) continue;
    mine = found;
    mine_rank = rank;
    if (lane_index() == 0) atomicMin(&memory.overflowing, rank);
  }
  __syncthreads();
  if (memory.overflowing == c.ranks) return true;
  if (lane_index() == 0 && mine_rank == memory.overflowing) {
    fail(c, FailureKind::overflow, Phase::dispatch_counts, mine_rank, mine.capacity, mine.needed);
  }
  return false;
}

// What exchange_counts comes to.
struct Planned {
  std::uint64_t call = 0;
  bool good = false;  // slots are known
};

// By the last block that has counted. meanwhile(): what else it may do while others' counts are on their way. Block-uniform, with a
// barrier at the end.
template <class Meanwhile>
__device__ inline Planned exchange_counts(const PlanArgs& args, PlanMemory& memory, Meanwhile&& meanwhile) {
  const Context& c = args.context;
  const int words = static_cast<int>(c.shape.count_words());
  const std::int32_t first_count = count_thread() < words ? args.counts[count_thread()] : 0;  // on its way together with the state
  const CallState state = state_of_call(c);
  const Planned failed{.call = state.call};
  if (!leave_aborted(c, state)) {
    meanwhile();
    return failed;
  }
  publish_counts(args, state.call, first_count);
  scan_chunks(args);
  meanwhile();
  std::int32_t* const sums = sums_of(args, memory);
  if (threadIdx.x == 0) memory.overflowing = c.ranks;
  if (!has_few_counts(c)) __syncthreads();  // what was published is overwritten
  bool good = check_peers(c, args.header, Phase::dispatch_counts, state.call);
  for (int peer = threadIdx.x; peer < c.ranks; peer += static_cast<int>(blockDim.x)) {
    if (peer == c.rank) continue;
    good = has_begun(c, args.header, {.peer = peer, .phase = Phase::dispatch_counts, .call = state.call, .timed = true}) && good;
  }
  bool fits = true;
  good = sum_counts(args, state.call, sums, fits) && good;
  if (__syncthreads_and(good) == 0) return failed;
  const bool is_simple = !args.limits.expert_layout && args.host == nullptr;  // only rows count, which has been looked at
  if (!is_simple || __syncthreads_and(fits) == 0) return {.call = state.call, .good = everything_fits(args, sums, memory)};
  if (threadIdx.x == 0) memory.layout_rows = sums[c.rank];
  __syncthreads();
  return {.call = state.call, .good = true};
}

// What the handle says of this rank's counts. By the crew.
__device__ inline void fill_handle(const PlanArgs& args, const std::int32_t* sums, const PlanMemory& memory, std::uint64_t call,
                                   const Crew& crew) {
  const Context& c = args.context;
  const HandleView& handle = args.handle;
  const auto rows_from = [&](int source) { return protocol::count_in(count_row(c, c.rank, source, call)[c.rank]); };
  for (int rank = crew.index(); rank < c.ranks; rank += crew.count()) {
    handle.rank_counts[rank] = rows_from(rank);
    handle.sent_counts[rank] = protocol::count_in(count_row(c, c.rank, c.rank, call)[rank]);
  }
  for (int local = crew.index(); local < args.routing.local_experts; local += crew.count()) {
    handle.expert_counts[local] = sums[c.shape.instance_word(c.rank, local)];
    handle.dropped[local] = 0;
  }
  if (crew.index() < kLanes) {
    std::int32_t sum = 0;
    for (int begin = 0; begin < c.ranks; begin += kLanes) {
      const int source = begin + lane_index();
      const std::int32_t rows = source < c.ranks ? rows_from(source) : 0;
      const std::int32_t inclusive = inclusive_sum(rows);
      if (source < c.ranks) handle.source_begin[source] = sum + inclusive - rows;
      sum += __shfl_sync(kAllLanes, inclusive, kLanes - 1);
    }
    if (lane_index() == 0) handle.source_begin[c.ranks] = sum;
  }
  if (crew.index() != 0) return;
  HandleView::Header header{.call = call,
                            .num_tokens = args.routing.num_tokens,
                            .num_rows = sums[c.rank],
                            .layout_rows = static_cast<std::int32_t>(memory.layout_rows)};
  take_id_counts(c, header);
  *handle.header = header;
  tell_host(args.host, call, header, static_cast<std::int32_t>(memory.pairs));
}

// By the block that has exchanged counts: tells the handle and the host. A call that has failed is cleared when it ends; the host must
// not wait for it.
__device__ inline void finish_plan(const PlanArgs& args, PlanMemory& memory, const Planned& planned, const Crew& crew) {
  if (planned.good) {
    fill_handle(args, sums_of(args, memory), memory, planned.call, crew);
  } else if (crew.index() == 0) {
    tell_host(args.host, planned.call, {.call = planned.call, .num_tokens = args.routing.num_tokens}, 0);
  }
}

// For the next one. By the threads of one block, when nobody needs the counts any more.
__device__ inline void clear_plan(const PlanArgs& args) {
  for (int word = threadIdx.x; word < args.context.shape.count_words(); word += blockDim.x) args.counts[word] = 0;
  if (threadIdx.x != 0) return;
  reset_id_counts(args.context);
  args.context.tickets[kPlannedTicket] = args.context.tickets[kOwnPlacedTicket] = 0;
}

// By a kernel whose blocks are all resident: every block goes on as soon as slots are known. In the block that made the plan the crew
// tells the handle, which others know when this rank's records are published. meanwhile(): what else may begin once a block has counted.
// Block-uniform; false: the call has failed.
template <class Meanwhile>
__device__ inline bool plan(const PlanArgs& args, PlanMemory& memory, const Crew& crew, Meanwhile&& meanwhile) {
  const Context& c = args.context;
  count_tokens(args, memory);
  if (is_last_block(c, kCountedTicket)) {
    const Planned planned = exchange_counts(args, memory, meanwhile);
    if (threadIdx.x == 0) ptx::add_acquire_release(&c.tickets[kPlannedTicket], planned.good ? 1U : 2U);
    if (crew.index() >= 0) finish_plan(args, memory, planned, crew);
    return planned.good;
  }
  meanwhile();
  std::uint32_t planned = 1;
  if (threadIdx.x == 0) {
    while ((planned = ptx::load_acquire_local(&c.tickets[kPlannedTicket])) == 0) {
    }
  }
  return __syncthreads_and(planned == 1) != 0;
}

}  // namespace tokenyard::cuda
