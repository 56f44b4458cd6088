#pragma once
// How many rows of which token go where: blocks count chunks of tokens, and number what goes to each rank.

#include "kernels/cuda/received.cuh"
#include "kernels/cuda/routing.cuh"

namespace tokenyard::cuda {

using protocol::kHistogramWords;

constexpr int kMaskRanks = 64;    // up to so many ranks the masks of a tile are built in shared memory
constexpr int kTileMasks = 1024;  // tokens x ranks of a tile

enum PlanTicket {
  kCountedTicket = 8,     // blocks that have counted
  kPlannedTicket = 32,    // 0 not yet, 1 go, 2 failed. Far from the others: every block looks at it.
  kOwnPlacedTicket = 48,  // blocks that have found the places of their own rows: every mover looks at it
};

// Of one block.
struct PlanMemory {
  std::uint64_t masks[kTileMasks];
  std::int32_t counts[kHistogramWords];
  int overflowing;  // the first rank that overflows
  std::int64_t layout_rows;
  std::int64_t pairs;

  // [kPlaceWords], when the plan is over.
  __device__ std::int32_t* words() {
    static_assert(sizeof masks + sizeof counts == kPlaceWords * sizeof(std::int32_t));
    return reinterpret_cast<std::int32_t*>(masks);
  }
};

// A run of tokens whose masks are built at once, [token][rank]: whole chunks, or a part of one.
struct Tile {
  int first = 0;
  int end = 0;
  std::uint64_t* masks = nullptr;
};

__device__ inline bool has_few_counts(const Context& c) { return c.shape.count_words() <= kHistogramWords; }

// A top-k position of a token, and the instances that serve it; null: none.
struct Position {
  int token = 0;
  int k = 0;
  std::int64_t expert = -1;
  const std::uint32_t* shards = nullptr;
  std::uint32_t first = kNoInstance;  // of shards
};

// Bits of a mask are set by many threads, in halves, because atomics on 32 bits are one instruction in shared memory.
__device__ inline void mark_position(const PlanArgs& args, const Tile& tile, std::int32_t* counts, const Position& at) {
  const Context& c = args.context;
  auto* halves = reinterpret_cast<std::uint32_t*>(tile.masks);
  for (int shard = 0; shard < args.routing.table.max_fanout; ++shard) {
    const std::uint32_t instance = shard == 0 ? at.first : at.shards[shard];
    if (instance == kNoInstance) break;
    const int rank = placement_internal::instance_rank(instance);
    atomicOr(&halves[2 * ((at.token - tile.first) * c.ranks + rank) + at.k / kLanes], 1U << (at.k % kLanes));
    atomicAdd(&counts[c.shape.instance_word(rank, placement_internal::instance_local(instance))], 1);
  }
}

// Marks (token, rank) with the top-k positions that the rank serves, and counts rows per local expert.
__device__ inline void mark_tile(const PlanArgs& args, const Tile& tile, std::int32_t* counts) {
  const Context& c = args.context;
  const RoutingArgs& routing = args.routing;
  constexpr int kAtOnce = 2;  // ids, and then instances, on their way
  const auto step = static_cast<int>(blockDim.x);
  const int tokens_on = step / routing.top_k, k_on = step % routing.top_k;  // from one position of a thread to its next
  int token = tile.first + static_cast<int>(threadIdx.x) / routing.top_k;
  int k = static_cast<int>(threadIdx.x) % routing.top_k;
  IdCounts ids;
  while (token < tile.end) {
    Position at[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      at[j] = {.token = token, .k = k};
      if (token < tile.end) at[j].expert = id_at(routing, token, k);
      token += tokens_on;
      k += k_on;
      if (k >= routing.top_k) {
        k -= routing.top_k;
        ++token;
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      at[j].shards = shards_for(routing, c.rank, at[j].token, at[j].expert);
      if (at[j].shards != nullptr) at[j].first = at[j].shards[0];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (at[j].token >= tile.end) break;
      check_id(c, routing, at[j].token, at[j].k, at[j].expert, ids);
      if (at[j].shards == nullptr) continue;
      if (at[j].first == kNoInstance) ++ids.lost;
      mark_position(args, tile, counts, at[j]);
    }
  }
  add_id_counts(c, ids);
}

// Numbers the rows for each rank within each chunk, by a warp. The running number stays in numbers.before between parts of a chunk.
__device__ inline void number_tile(const PlanArgs& args, const Tile& tile) {
  const Context& c = args.context;
  const volatile std::uint64_t* masks = tile.masks;  // volatile: atomics have written them behind the L1 cache
  const int first_chunk = tile.first / kPlanChunk;
  const int chunks = (tile.end + kPlanChunk - 1) / kPlanChunk - first_chunk;
  for (int unit = warp_index(); unit < chunks * c.ranks; unit += warps_of_block()) {
    const int rank = unit % c.ranks;
    const int chunk = first_chunk + unit / c.ranks;
    const int chunk_end = min((chunk + 1) * kPlanChunk, args.routing.num_tokens);
    const int end = min(tile.end, chunk_end);
    std::int32_t& running = args.numbers.before[static_cast<std::int64_t>(chunk) * c.ranks + rank];
    std::int32_t rows = tile.first > chunk * kPlanChunk ? running : 0;
    for (int begin = max(tile.first, chunk * kPlanChunk); begin < end; begin += kLanes) {
      const int token = begin + lane_index();
      const std::uint64_t mask = token < end ? masks[(token - tile.first) * c.ranks + rank] : 0;
      const unsigned present = __ballot_sync(kAllLanes, mask != 0);
      if (token < end) {
        const std::int64_t at = static_cast<std::int64_t>(token) * c.ranks + rank;
        args.numbers.number[at] = mask != 0 ? rows + __popc(present & lanes_below()) : -1;
        args.handle.k_masks[at] = mask;
      }
      rows += __popc(present);
    }
    __syncwarp();
    if (lane_index() != 0) continue;
    running = rows;
    if (end == chunk_end && rows != 0) atomicAdd(&args.counts[rank], rows);
  }
}

// [begin, end) of chunks.
__device__ inline void count_chunks(const PlanArgs& args, int begin, int end, PlanMemory& memory) {
  const Context& c = args.context;
  const int end_token = min(end * kPlanChunk, args.routing.num_tokens);
  const bool few_ranks = c.ranks <= kMaskRanks;
  const int room = kTileMasks / c.ranks;
  const int tile_tokens = !few_ranks ? kPlanChunk : room < kPlanChunk ? room : room / kPlanChunk * kPlanChunk;
  const int words = static_cast<int>(c.shape.count_words());
  std::int32_t* counts = has_few_counts(c) ? memory.counts : args.counts;
  for (int i = threadIdx.x; has_few_counts(c) && i < words; i += blockDim.x) counts[i] = 0;
  for (int first = begin * kPlanChunk; first < end_token;) {
    // A part of a chunk ends with it.
    const int part_end = tile_tokens < kPlanChunk ? min(end_token, (first / kPlanChunk + 1) * kPlanChunk) : end_token;
    Tile tile{.first = first, .end = min(first + tile_tokens, part_end), .masks = memory.masks};
    if (!few_ranks) tile.masks = args.handle.k_masks + static_cast<std::int64_t>(first) * c.ranks;
    for (int i = threadIdx.x; i < (tile.end - tile.first) * c.ranks; i += blockDim.x) tile.masks[i] = 0;
    __syncthreads();
    mark_tile(args, tile, counts);
    __syncthreads();
    number_tile(args, tile);
    __syncthreads();
    first = tile.end;
  }
  for (int i = threadIdx.x; has_few_counts(c) && i < words; i += blockDim.x) {
    if (counts[i] != 0) atomicAdd(&args.counts[i], counts[i]);
  }
  if (args.own.rows == nullptr) return;
  const int experts = args.routing.local_experts;
  for (int local = threadIdx.x; local < experts; local += blockDim.x) {
    args.own.counts[static_cast<std::int64_t>(blockIdx.x) * experts + local] = counts[c.shape.instance_word(c.rank, local)];
  }
}

// The chunks of tokens that each block counts.
struct CountShares {
  int chunks = 0;  // of all
  int each = 0;

  __device__ explicit CountShares(const PlanArgs& args) : chunks((args.routing.num_tokens + kPlanChunk - 1) / kPlanChunk) {
    each = (chunks + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  }
  __device__ int begin() const { return min(static_cast<int>(blockIdx.x) * each, chunks); }
  __device__ int end() const { return min(begin() + each, chunks); }
  __device__ int blocks() const { return chunks == 0 ? 0 : (chunks + each - 1) / each; }  // that have some
};

// By all blocks: this rank's announcement, by the one that has the least to count, and its counts.
__device__ inline void count_tokens(const PlanArgs& args, PlanMemory& memory) {
  if (blockIdx.x == gridDim.x - 1) begin_call(args.context, args.header, protocol::offer(args.buffer), state_of_call(args.context));
  const CountShares share(args);
  if (share.begin() < share.end()) count_chunks(args, share.begin(), share.end(), memory);
}

}  // namespace tokenyard::cuda
