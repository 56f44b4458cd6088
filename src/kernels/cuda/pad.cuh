#pragma once
// Expert layouts by the kernel that landed the rows: a block for each local expert finds the rows that are its, in order, and copies
// them. Groups begin at multiples of the capacity, or, in expert_major, behind those before, whose rows were counted as they landed.

#include <limits>

#include "kernels/cuda/spread_parts.cuh"

namespace tokenyard::cuda {

constexpr int kPadThreads = 512;
constexpr int kPadWarps = kPadThreads / kLanes;
constexpr int kPadUnroll = 4;  // pairs that a lane looks at
constexpr int kPadRound = kPadThreads * kPadUnroll;

// Each is a kernel of its own: what it does not do is no code that has to be fetched.
enum class Pads : std::uint8_t { none, padded, packed };  // packed: expert_major

// A pad as the kernel gets it.
template <Pads kPads>
struct PadJob {
  SpreadJob spread;
  std::int32_t capacity = 0;  // the most rows of a group
  std::int32_t alignment = 1;
  bool drop = false;

  __device__ const HandleView& handle() const { return spread.args.handle; }
  __device__ const Context& context() const { return spread.args.context; }
  __device__ std::int32_t packed_size(std::int32_t count) const {
    return static_cast<std::int32_t>(protocol::align_up(min(count, capacity), alignment));
  }
};
template <Pads kPads>
PadJob<kPads> pad_job(const PadArgs& args) {
  if (kPads == Pads::none) return {};
  constexpr std::int64_t kNoLimit = std::numeric_limits<std::int32_t>::max();
  return {.spread = spread_job(args.spread),
          .capacity = static_cast<std::int32_t>(args.capacity != 0 ? args.capacity : kNoLimit),
          .alignment = args.alignment,
          .drop = args.drop};
}

// The output rows of a group, padding included.
struct PadGroup {
  std::int32_t begin;
  std::int32_t end;
};

struct PadMemory {
  PadGroup group;    // packed
  std::int32_t all;  // packed: output rows of all groups
  std::int32_t warp_counts[kPadWarps];
  std::int32_t sent_begins[kMostPadRanks + 1];  // [R+1]: of each source, among all pairs that were sent
  std::int32_t source_counts[kMostPadRanks];    // of the group; padded
  std::uint16_t pairs[kPadRound];               // found in this round
};

// sent_of(source): how many tokens it sends. A barrier must follow.
template <Pads kPads, class SentOf>
__device__ inline void count_sent(const PadJob<kPads>& job, PadMemory& memory, SentOf&& sent_of) {
  if (threadIdx.x != 0) return;
  memory.sent_begins[0] = 0;
  for (int source = 0; source < job.context().ranks; ++source) {
    memory.sent_begins[source + 1] = memory.sent_begins[source] + sent_of(source) * job.handle().top_k;
  }
}

// The pair that is number `at` of those that were sent; -1: there are not so many. `source`: of an earlier one, and then of this one.
template <Pads kPads>
__device__ __forceinline__ int sent_pair(const PadJob<kPads>& job, const PadMemory& memory, int at, int& source) {
  const int ranks = job.context().ranks;
  const int most = static_cast<int>(job.context().shape.max_tokens_per_rank) * job.handle().top_k;
  if (at >= memory.sent_begins[ranks]) return -1;
  if (memory.sent_begins[ranks] == ranks * most) return at;  // all have sent as much as they may
  while (at >= memory.sent_begins[source + 1]) ++source;
  return source * most + at - memory.sent_begins[source];
}

// Finds the pairs of `local` among those sent from number `first` on, as many as a round has, in order. Returns how many. Ends with a
// barrier.
template <Pads kPads>
__device__ inline int find_pairs(const PadJob<kPads>& job, int local, int first, PadMemory& memory) {
  const int begin = first + warp_index() * kPadUnroll * kLanes + lane_index();
  int pairs[kPadUnroll], source = 0;
  std::int32_t ids[kPadUnroll];
  unsigned found[kPadUnroll];
#pragma unroll
  for (int j = 0; j < kPadUnroll; ++j) pairs[j] = sent_pair(job, memory, begin + j * kLanes, source);
#pragma unroll
  for (int j = 0; j < kPadUnroll; ++j) ids[j] = pairs[j] >= 0 ? job.handle().local_ids[pairs[j]] : -1;
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
    if (ids[j] == local) memory.pairs[before + __popc(found[j] & lanes_below())] = static_cast<std::uint16_t>(pairs[j]);
    before += __popc(found[j]);
  }
  __syncthreads();
  return all;
}

// Where the pairs go that were found, the first of them to `to`, and what the output says of them; those from number `kept` on are dropped.
template <Pads kPads>
__device__ inline void place_found(const PadJob<kPads>& job, int found, int kept, std::int32_t to, PadMemory& memory) {
  const HandleView& handle = job.handle();
  const int max_tokens = static_cast<int>(job.context().shape.max_tokens_per_rank);
  for (int i = threadIdx.x; i < found; i += kPadThreads) {
    const int pair = memory.pairs[i];
    const int row = pair / handle.top_k;
    const int source = row / max_tokens;
    if constexpr (kPads == Pads::padded) atomicAdd(&memory.source_counts[source], 1);
    handle.output_row[pair] = i < kept ? to + i : -1;
    if (i >= kept) continue;
    handle.out_weights[to + i] = handle.weights[pair];
    handle.out_source_rank[to + i] = source;
    handle.out_source_token[to + i] = row - source * max_tokens;
    handle.out_source_k[to + i] = pair - row * handle.top_k;
  }
}

template <Pads kPads>
__device__ inline void copy_found(const PadJob<kPads>& job, int kept, std::int32_t to, const PadMemory& memory) {
  const int pieces = spread_pieces(job.spread.args);
  for (int share = warp_index(); share < kept * pieces; share += kPadWarps) {
    const int i = share / pieces;
    spread_piece(job.spread, memory.pairs[i] / job.handle().top_k, share - i * pieces, lane_index() == 0 ? to + i : -1);
  }
}

// Output rows [begin, end) that have no row, by `blocks` blocks, this one being number `block`.
template <Pads kPads>
__device__ inline void leave_empty(const PadJob<kPads>& job, std::int32_t begin, std::int32_t end, int block, int blocks) {
  for (std::int32_t row = begin + block * kPadThreads + static_cast<int>(threadIdx.x); row < end; row += blocks * kPadThreads) {
    clear_output(job.handle(), row);
  }
  if (!job.spread.args.zero_padding) return;
  for (std::int32_t row = begin + block * kPadWarps + warp_index(); row < end; row += blocks * kPadWarps) zero_row(job.spread, row);
}

// What the handle says of a group of `count` rows of which `kept` have their place, and the rest of its places. Begins with a barrier.
template <Pads kPads>
__device__ inline void close_group(const PadJob<kPads>& job, int local, PadGroup group, int count, const PadMemory& memory) {
  const HandleView& handle = job.handle();
  const int ranks = job.context().ranks, kept = min(count, job.capacity);
  __syncthreads();
  for (int source = threadIdx.x; source < ranks && kPads == Pads::padded; source += kPadThreads) {
    int before = 0;
    for (int other = 0; other < source; ++other) before += memory.source_counts[other];
    std::int32_t* const range = handle.ranges + 2 * (local * ranks + source);
    range[0] = min(before, kept);
    range[1] = min(before + memory.source_counts[source], kept) - range[0];
  }
  if (threadIdx.x == 0) {
    handle.expert_counts[local] = kept;
    handle.dropped[local] = count - kept;
    handle.expert_offsets[local] = group.begin;
    handle.expert_offsets[local + 1] = group.end;  // the next one's begin
  }
  leave_empty(job, group.begin + kept, group.end, 0, 1);
}

// Where the group of a local expert lies; packed: also memory.all. Begins with a barrier. Whoever closes a group writes its count again,
// without what was dropped, which makes no difference here.
template <Pads kPads>
__device__ inline PadGroup find_group(const PadJob<kPads>& job, int local, int local_experts, PadMemory& memory) {
  __syncthreads();  // the group before is closed
  if constexpr (kPads == Pads::padded) {
    return {local * job.capacity, (local + 1) * job.capacity};
  } else {
    if (threadIdx.x == 0) {
      memory.group = {};
      memory.all = 0;
    }
    __syncthreads();
    for (int first = warp_index() * kLanes; first < local_experts; first += kPadThreads) {
      const int other = first + lane_index();
      const std::int32_t size = other < local_experts ? job.packed_size(job.handle().expert_counts[other]) : 0;
      const std::int32_t before = __reduce_add_sync(kAllLanes, other < local ? size : 0);
      const std::int32_t with = __reduce_add_sync(kAllLanes, other <= local ? size : 0), all = __reduce_add_sync(kAllLanes, size);
      if (lane_index() != 0) continue;
      atomicAdd(&memory.group.begin, before);
      atomicAdd(&memory.group.end, with);
      atomicAdd(&memory.all, all);
    }
    __syncthreads();
    return memory.group;
  }
}

// The group of one local expert. More rows than its capacity, unless they may be dropped, fail the call: this rank alone knows, and
// tells the others.
template <Pads kPads>
__device__ inline void pad_expert(const PadJob<kPads>& job, int local, PadGroup group, PadMemory& memory) {
  const Context& c = job.context();
  for (int source = threadIdx.x; source < c.ranks; source += kPadThreads) memory.source_counts[source] = 0;
  int count = 0;
  for (int first = 0; first < memory.sent_begins[c.ranks]; first += kPadRound) {
    const int found = find_pairs(job, local, first, memory);
    const int kept = max(0, min(found, job.capacity - count));
    const std::int32_t to = group.begin + count;
    place_found(job, found, kept, to, memory);
    copy_found(job, kept, to, memory);
    count += found;
  }
  close_group(job, local, group, count, memory);
  if (count > job.capacity && !job.drop && threadIdx.x == 0) {
    fail(c, FailureKind::overflow, Phase::dispatch_rows, c.rank, job.capacity, count);
  }
}

// By all blocks of the grid.
template <Pads kPads>
__device__ inline void pad_experts(const PadJob<kPads>& job, int local_experts, PadMemory& memory) {
  const Context& c = job.context();
  const auto most = static_cast<std::int32_t>(job.spread.args.output_rows);
  for (int local = static_cast<int>(blockIdx.x); local < local_experts; local += static_cast<int>(gridDim.x)) {
    const PadGroup group = find_group(job, local, local_experts, memory);
    if (kPads == Pads::packed && memory.all > most) {  // all blocks see the same, and none places anything
      if (local == 0 && threadIdx.x == 0) fail(c, FailureKind::overflow, Phase::dispatch_rows, c.rank, most, memory.all);
      return;
    }
    pad_expert(job, local, group, memory);
    if (kPads == Pads::packed) leave_empty(job, memory.all, most, local, local_experts);
  }
}

}  // namespace tokenyard::cuda
