// Who gets what, and where: every block counts a chunk of tokens, the last one exchanges counts with all ranks.

#include <algorithm>

#include "core/preload.h"
#include "kernels/cuda/received.cuh"
#include "kernels/cuda/routing.cuh"
#include "protocol/overflow.h"

namespace tokenyard::cuda {
namespace {

using protocol::ExpertTally;
using protocol::kHistogramWords;
using protocol::Overflow;

constexpr int kPlanThreads = 1024;
constexpr int kMaskRanks = 64;    // up to so many ranks the masks of a tile are built in shared memory
constexpr int kTileMasks = 4096;  // tokens x ranks of a tile

enum Ticket { kPlanTicket };

struct ChunkMemory {
  std::uint64_t masks[kTileMasks];
  std::int32_t counts[kHistogramWords];
};
struct LastMemory {
  int overflowing;  // the first rank that overflows
  std::int64_t layout_rows;
  std::int64_t pairs;
};

// A run of tokens whose masks are built at once, [token][rank].
struct Tile {
  std::int32_t first = 0;
  int tokens = 0;
  std::uint64_t* masks = nullptr;
};

// Marks (token, rank) with the top-k positions that the rank serves, and counts rows per local expert. Bits of a mask are set
// by many threads, in halves, because atomics on 32 bits are one instruction in shared memory.
__device__ void mark_tile(const PlanArgs& args, const Tile& tile, std::int32_t* counts) {
  const Context& c = args.context;
  const RoutingArgs& routing = args.routing;
  auto* halves = reinterpret_cast<std::uint32_t*>(tile.masks);
  IdCounts ids;
  for (int i = threadIdx.x; i < tile.tokens * routing.top_k; i += kPlanThreads) {
    const int t = i / routing.top_k;
    const int k = i - t * routing.top_k;
    const std::int32_t token = tile.first + t;
    const std::uint32_t* shards = checked_shards(c, routing, token, k, ids);
    if (shards == nullptr) continue;
    for (int shard = 0; shard < routing.table.max_fanout && shards[shard] != kNoInstance; ++shard) {
      const int rank = placement_internal::instance_rank(shards[shard]);
      atomicOr(&halves[2 * (t * c.ranks + rank) + k / kLanes], 1U << (k % kLanes));
      atomicAdd(&counts[c.shape.instance_word(rank, placement_internal::instance_local(shards[shard]))], 1);
    }
  }
  add_id_counts(c, ids);
}

// Numbers the rows for each rank within the chunk, one rank per warp. The running number stays in numbers.before between tiles.
__device__ void number_tile(const PlanArgs& args, const Tile& tile, bool is_first, bool is_last) {
  const Context& c = args.context;
  const volatile std::uint64_t* masks = tile.masks;  // volatile: atomics have written them behind the L1 cache
  std::int32_t* running = args.numbers.before + static_cast<std::int64_t>(blockIdx.x) * c.ranks;
  for (int rank = warp_index(); rank < c.ranks; rank += warps_of_block()) {
    std::int32_t rows = is_first ? 0 : running[rank];
    for (int begin = 0; begin < tile.tokens; begin += kLanes) {
      const int t = begin + lane_index();
      const std::uint64_t mask = t < tile.tokens ? masks[t * c.ranks + rank] : 0;
      const unsigned present = __ballot_sync(kAllLanes, mask != 0);
      if (t < tile.tokens) {
        const std::int64_t at = static_cast<std::int64_t>(tile.first + t) * c.ranks + rank;
        args.numbers.number[at] = mask != 0 ? rows + __popc(present & lanes_below()) : -1;
        args.handle.k_masks[at] = mask;
      }
      rows += __popc(present);
    }
    __syncwarp();
    if (lane_index() != 0) continue;
    running[rank] = rows;
    if (is_last && rows != 0) atomicAdd(&args.counts[rank], rows);
  }
}

__device__ void count_chunk(const PlanArgs& args, ChunkMemory& memory) {
  const Context& c = args.context;
  const int begin = static_cast<int>(blockIdx.x) * kPlanChunk;
  const int end = min(begin + kPlanChunk, args.routing.num_tokens);
  const bool few_ranks = c.ranks <= kMaskRanks;
  const int tile_tokens = few_ranks ? min(kPlanChunk, kTileMasks / c.ranks) : kPlanChunk;
  const int words = static_cast<int>(c.shape.count_words());
  const bool few_counts = words <= kHistogramWords;
  std::int32_t* counts = few_counts ? memory.counts : args.counts;
  for (int i = threadIdx.x; few_counts && i < words; i += kPlanThreads) counts[i] = 0;
  for (int first = begin; first < end; first += tile_tokens) {
    Tile tile{.first = first, .tokens = min(tile_tokens, end - first), .masks = memory.masks};
    if (!few_ranks) tile.masks = args.handle.k_masks + static_cast<std::int64_t>(first) * c.ranks;
    for (int i = threadIdx.x; i < tile.tokens * c.ranks; i += kPlanThreads) tile.masks[i] = 0;
    __syncthreads();
    mark_tile(args, tile, counts);
    __syncthreads();
    number_tile(args, tile, first == begin, first + tile_tokens >= end);
    __syncthreads();
  }
  for (int i = threadIdx.x; few_counts && i < words; i += kPlanThreads) {
    if (counts[i] != 0) atomicAdd(&args.counts[i], counts[i]);
  }
  if (args.own_counts == nullptr) return;
  const int experts = args.routing.local_experts;
  for (int local = threadIdx.x; local < experts; local += kPlanThreads) {
    args.own_counts[static_cast<std::int64_t>(blockIdx.x) * experts + local] = counts[c.shape.instance_word(c.rank, local)];
  }
}

// Tells everybody that this rank has begun, together with its row of the count matrix.
__device__ void publish_counts(const PlanArgs& args, std::uint64_t call) {
  const Context& c = args.context;
  const int words = static_cast<int>(c.shape.count_words());
  for (int word = threadIdx.x; word < words; word += kPlanThreads) {
    const std::int32_t count = args.counts[word];
    for (int i = 0; i < c.ranks; ++i) count_row(c, (c.rank + 1 + i) % c.ranks, c.rank, call)[word] = count;
  }
  __syncthreads();
  announce_at_once(c, args.header, protocol::offer(args.buffer), call);
}

// sums becomes the sum over all ranks.
__device__ void sum_counts(const PlanArgs& args, std::uint64_t call, std::int32_t* sums) {
  const Context& c = args.context;
  for (int word = threadIdx.x; word < c.shape.count_words(); word += kPlanThreads) {
    std::int32_t sum = 0;
#pragma unroll 4
    for (int source = 0; source < c.ranks; ++source) sum += count_row(c, c.rank, source, call)[word];
    sums[word] = sum;
  }
  __syncthreads();
}

__device__ ExpertTally tally_experts(const PlanArgs& args, const protocol::CountLimits& limits, const std::int32_t* sums, int rank) {
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

// From the sums, which every rank has: the same decision everywhere, so that all fail alike. One rank per warp. Block-uniform.
__device__ bool everything_fits(const PlanArgs& args, const std::int32_t* sums, LastMemory& memory) {
  const Context& c = args.context;
  const protocol::CountLimits limits{.receive_rows = c.shape.receive_rows,
                                     .expert_capacity = args.limits.expert_capacity,
                                     .max_layout_rows = args.limits.max_layout_rows,
                                     .alignment = args.limits.alignment,
                                     .drop = args.limits.drop,
                                     .expert_layout = args.limits.expert_layout};
  if (threadIdx.x == 0) memory.overflowing = c.ranks;
  __syncthreads();
  Overflow mine;
  int mine_rank = -1;
  for (int rank = warp_index(); rank < c.ranks; rank += warps_of_block()) {
    ExpertTally tally;
    if (limits.expert_layout || rank == c.rank) tally = tally_experts(args, limits, sums, rank);
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

// Rows of earlier chunks. By all warps.
__device__ void scan_chunks(const PlanArgs& args) {
  const Context& c = args.context;
  const int chunks = (args.routing.num_tokens + kPlanChunk - 1) / kPlanChunk;
  for (int rank = warp_index(); rank < c.ranks; rank += warps_of_block()) {
    exclusive_scan_column(args.numbers.before + rank, c.ranks, chunks);
  }
}

// Rows of lower ranks. By warps from the last one on: the first ones have more to do.
__device__ void find_bases(const PlanArgs& args, std::uint64_t call) {
  const Context& c = args.context;
  for (int rank = warps_of_block() - 1 - warp_index(); rank < c.ranks; rank += warps_of_block()) {
    std::int32_t base = 0;
    for (int source = lane_index(); source < c.rank; source += kLanes) base += count_row(c, c.rank, source, call)[rank];
    base = __reduce_add_sync(kAllLanes, base);
    if (lane_index() == 0) args.numbers.base[rank] = base;
  }
}

// What the handle says of this rank's counts.
__device__ void fill_handle(const PlanArgs& args, const std::int32_t* sums, const LastMemory& memory, std::uint64_t call) {
  const Context& c = args.context;
  const HandleView& handle = args.handle;
  for (int rank = threadIdx.x; rank < c.ranks; rank += kPlanThreads) {
    handle.rank_counts[rank] = count_row(c, c.rank, rank, call)[c.rank];
    handle.sent_counts[rank] = count_row(c, c.rank, c.rank, call)[rank];
  }
  for (int local = threadIdx.x; local < args.routing.local_experts; local += kPlanThreads) {
    handle.expert_counts[local] = sums[c.shape.instance_word(c.rank, local)];
    handle.dropped[local] = 0;
  }
  if (warp_index() == 0) {
    std::int32_t sum = 0;
    for (int begin = 0; begin < c.ranks; begin += kLanes) {
      const int source = begin + lane_index();
      const std::int32_t rows = source < c.ranks ? count_row(c, c.rank, source, call)[c.rank] : 0;
      const std::int32_t inclusive = inclusive_sum(rows);
      if (source < c.ranks) handle.source_begin[source] = sum + inclusive - rows;
      sum += __shfl_sync(kAllLanes, inclusive, kLanes - 1);
    }
    if (lane_index() == 0) handle.source_begin[c.ranks] = sum;
  }
  if (threadIdx.x != 0) return;
  HandleView::Header header{.call = call,
                            .num_tokens = args.routing.num_tokens,
                            .num_rows = sums[c.rank],
                            .layout_rows = static_cast<std::int32_t>(memory.layout_rows)};
  take_id_counts(c, header);
  *handle.header = header;
}

// By the last block. Block-uniform; false: the call has failed.
__device__ bool exchange_counts(const PlanArgs& args, const CallState& state, std::int32_t* sums, LastMemory& memory) {
  const Context& c = args.context;
  const std::uint64_t call = state.call;
  if (!settle(c, state)) return false;
  publish_counts(args, call);
  scan_chunks(args);  // while others' counts are on their way
  if (!wait_until_begun(c, args.header, Phase::dispatch_counts, call)) return false;
  sum_counts(args, call, sums);
  if (!everything_fits(args, sums, memory)) return false;
  fill_handle(args, sums, memory, call);
  find_bases(args, call);
  return true;
}

__global__ void __launch_bounds__(kPlanThreads) plan_dispatch(const __grid_constant__ PlanArgs args) {
  __shared__ ChunkMemory chunk;
  __shared__ LastMemory last;
  const Context& c = args.context;
  if (!block_has_failed(c)) count_chunk(args, chunk);
  if (!is_last_block(c, kPlanTicket)) return;
  const CallState state = state_of_call(c);
  const int words = static_cast<int>(c.shape.count_words());
  if (!exchange_counts(args, state, words <= kHistogramWords ? chunk.counts : args.counts, last)) {
    __syncthreads();
    clear_counts(c, args.handle, args.routing.num_tokens, args.routing.local_experts);
    clear_sent(c, args.handle, args.routing.num_tokens);
    last.pairs = 0;
  }
  __syncthreads();
  for (int word = threadIdx.x; word < words; word += kPlanThreads) args.counts[word] = 0;
  if (threadIdx.x != 0) return;
  reset_id_counts(c);
  tell_host(args.host, state.call, *args.handle.header, static_cast<std::int32_t>(last.pairs));
}

const Preloaded preloaded({{plan_dispatch}});

}  // namespace

void launch_plan(const PlanArgs& args, Stream stream) {
  const int chunks = (args.routing.num_tokens + kPlanChunk - 1) / kPlanChunk;
  const int blocks = std::max(chunks, 1);  // also without tokens there are counts to exchange
  plan_dispatch<<<blocks, kPlanThreads, 0, stream>>>(args);
}

}  // namespace tokenyard::cuda
