#pragma once
// expert_padded by the kernel that landed the rows: a block for each local expert finds the rows that are its, in order, and copies
// them. Groups begin at multiples of the capacity, so that no block needs to know another's rows.

#include "kernels/cuda/spread_parts.cuh"

namespace tokenyard::cuda {

constexpr int kPadThreads = 512;
constexpr int kPadWarps = kPadThreads / kLanes;
constexpr int kPadUnroll = 4;  // pairs that a lane looks at
constexpr int kPadRound = kPadThreads * kPadUnroll;

// A pad as the kernel gets it.
struct PadJob {
  SpreadJob spread;
  std::int32_t capacity = 0;
  bool drop = false;

  __device__ const HandleView& handle() const { return spread.args.handle; }
  __device__ const Context& context() const { return spread.args.context; }
  __device__ int pairs() const { return static_cast<int>(received_capacity(context(), Mode::latency)) * handle().top_k; }
};
inline PadJob pad_job(const PadArgs& args) {
  return {.spread = spread_job(args.spread), .capacity = static_cast<std::int32_t>(args.capacity), .drop = args.drop};
}

struct PadMemory {
  std::int32_t warp_counts[kPadWarps];
  std::int32_t source_counts[kMostPadRanks];
  std::uint16_t pairs[kPadRound];  // found in this round
};

// Finds the pairs of `local` among those from `first` on, as many as a round has, in order. Returns how many. Ends with a barrier.
__device__ inline int find_pairs(const PadJob& job, int local, int first, PadMemory& memory) {
  const int pairs = job.pairs();
  const int begin = first + warp_index() * kPadUnroll * kLanes + lane_index();
  std::int32_t ids[kPadUnroll];
  unsigned found[kPadUnroll];
#pragma unroll
  for (int j = 0; j < kPadUnroll; ++j) ids[j] = begin + j * kLanes < pairs ? job.handle().local_ids[begin + j * kLanes] : -1;
  int of_warp = 0;
#pragma unroll
  for (int j = 0; j < kPadUnroll; ++j) {
    found[j] = __ballot_sync(kAllLanes, ids[j] == local);
    of_warp += __popc(found[j]);
  }
  if (lane_index() == 0) memory.warp_counts[warp_index()] = of_warp;
  __syncthreads();
  int before = 0, all = 0;
  for (int warp = 0; warp < kPadWarps; ++warp) {
    if (warp == warp_index()) before = all;
    all += memory.warp_counts[warp];
  }
#pragma unroll
  for (int j = 0; j < kPadUnroll; ++j) {
    if (ids[j] == local) memory.pairs[before + __popc(found[j] & lanes_below())] = static_cast<std::uint16_t>(begin + j * kLanes);
    before += __popc(found[j]);
  }
  __syncthreads();
  return all;
}

// Where the pairs go that were found, the first of them to `to`, and what the output says of them; those from number `kept` on are dropped.
__device__ inline void place_found(const PadJob& job, int found, int kept, std::int32_t to, PadMemory& memory) {
  const HandleView& handle = job.handle();
  const int max_tokens = static_cast<int>(job.context().shape.max_tokens_per_rank);
  for (int i = threadIdx.x; i < found; i += kPadThreads) {
    const int pair = memory.pairs[i];
    const int row = pair / handle.top_k;
    const int source = row / max_tokens;
    atomicAdd(&memory.source_counts[source], 1);
    handle.output_row[pair] = i < kept ? to + i : -1;
    if (i >= kept) continue;
    handle.out_weights[to + i] = handle.weights[pair];
    handle.out_source_rank[to + i] = source;
    handle.out_source_token[to + i] = row - source * max_tokens;
    handle.out_source_k[to + i] = pair - row * handle.top_k;
  }
}

__device__ inline void copy_found(const PadJob& job, int kept, std::int32_t to, const PadMemory& memory) {
  const int pieces = spread_pieces(job.spread.args);
  for (int share = warp_index(); share < kept * pieces; share += kPadWarps) {
    const int i = share / pieces;
    spread_piece(job.spread, memory.pairs[i] / job.handle().top_k, share - i * pieces, lane_index() == 0 ? to + i : -1);
  }
}

// What the handle says of a group of `count` rows of which `kept` have their place, and the rest of its places. Begins with a barrier.
__device__ inline void close_group(const PadJob& job, int local, int count, int kept, const PadMemory& memory) {
  const HandleView& handle = job.handle();
  const int ranks = job.context().ranks;
  const std::int32_t begin = local * job.capacity;
  const std::int32_t end = begin + job.capacity;
  __syncthreads();
  for (int source = threadIdx.x; source < ranks; source += kPadThreads) {
    int before = 0;
    for (int other = 0; other < source; ++other) before += memory.source_counts[other];
    std::int32_t* const range = handle.ranges + 2 * (local * ranks + source);
    range[0] = min(before, kept);
    range[1] = min(before + memory.source_counts[source], kept) - range[0];
  }
  if (threadIdx.x == 0) {
    handle.expert_counts[local] = kept;
    handle.dropped[local] = count - kept;
    handle.expert_offsets[local] = begin;
    handle.expert_offsets[local + 1] = end;  // the next one's begin
  }
  for (std::int32_t row = begin + kept + static_cast<int>(threadIdx.x); row < end; row += kPadThreads) clear_output(handle, row);
  if (!job.spread.args.zero_padding) return;
  for (std::int32_t row = begin + kept + warp_index(); row < end; row += kPadWarps) zero_row(job.spread, row);
}

// The group of one local expert. More rows than its capacity, unless they may be dropped, fail the call: this rank alone knows, and
// tells the others.
__device__ inline void pad_expert(const PadJob& job, int local, PadMemory& memory) {
  const Context& c = job.context();
  __syncthreads();  // the group before is closed
  for (int source = threadIdx.x; source < c.ranks; source += kPadThreads) memory.source_counts[source] = 0;
  int count = 0;
  for (int first = 0; first < job.pairs(); first += kPadRound) {
    const int found = find_pairs(job, local, first, memory);
    const int kept = max(0, min(found, job.capacity - count));
    const std::int32_t to = local * job.capacity + count;
    place_found(job, found, kept, to, memory);
    copy_found(job, kept, to, memory);
    count += found;
  }
  close_group(job, local, count, min(count, job.capacity), memory);
  if (count > job.capacity && !job.drop && threadIdx.x == 0) {
    fail(c, FailureKind::overflow, Phase::dispatch_rows, c.rank, job.capacity, count);
  }
}

}  // namespace tokenyard::cuda
