// The dispatch of the collective exchange: who gets what, rows packed per destination, records turned into metadata.

#include <algorithm>

#include "core/preload.h"
#include "kernels/cuda/collective.cuh"
#include "kernels/cuda/routing.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kRankGroup = 64;         // ranks whose bits are looked at together
constexpr int kHistogramWords = 2048;  // up to so many counts are added up in shared memory first

struct PlanMemory {
  std::int32_t warp_rows[kCollectiveChunk / kLanes][kRankGroup];
  std::int32_t counts[kHistogramWords];
};

// The ranks in [first, first + kRankGroup) that the token goes to, as bits; counts rows of their experts.
__device__ std::uint64_t mark_token(const CollectivePlanArgs& args, std::int32_t token, int first, std::int32_t* counts) {
  const CollectivePlan& plan = args.plan;
  std::uint64_t ranks = 0;
  for (int k = 0; k < args.routing.top_k; ++k) {
    const std::uint32_t* shards = shards_for(args.routing, plan.rank, token, id_at(args.routing, token, k));
    if (shards == nullptr) continue;
    for (int shard = 0; shard < args.routing.table.max_fanout && shards[shard] != kNoInstance; ++shard) {
      const int rank = placement_internal::instance_rank(shards[shard]);
      if (rank < first || rank >= first + kRankGroup) continue;
      ranks |= std::uint64_t{1} << (rank - first);
      atomicAdd(&counts[rank * plan.words + 1 + placement_internal::instance_local(shards[shard])], 1);
    }
  }
  return ranks;
}

// Numbers the rows of the chunk for each of the group's ranks, in the order of tokens: one token per thread. Block-uniform.
__device__ void number_chunk(const CollectivePlan& plan, std::uint64_t mask, bool is_token, int first, PlanMemory& memory) {
  const int ranks = min(kRankGroup, plan.ranks - first);
  for (int r = 0; r < ranks; ++r) {
    const unsigned found = __ballot_sync(kAllLanes, (mask >> r & 1) != 0);
    if (lane_index() == 0) memory.warp_rows[warp_index()][r] = __popc(found);
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < ranks) {
    std::int32_t sum = 0;
    for (int warp = 0; warp < kCollectiveChunk / kLanes; ++warp) {
      const std::int32_t rows = memory.warp_rows[warp][threadIdx.x];
      memory.warp_rows[warp][threadIdx.x] = sum;
      sum += rows;
    }
    plan.chunk_begin[static_cast<std::int64_t>(blockIdx.x) * plan.ranks + first + threadIdx.x] = sum;
  }
  __syncthreads();
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kCollectiveChunk + threadIdx.x;
  for (int r = 0; r < ranks; ++r) {
    const bool goes = (mask >> r & 1) != 0;
    const unsigned found = __ballot_sync(kAllLanes, goes);
    const std::int32_t number = memory.warp_rows[warp_index()][r] + __popc(found & lanes_below());
    if (is_token) plan.slots[token * plan.ranks + first + r] = goes ? number : -1;
  }
  __syncthreads();
}

// True, in every thread, in the block of this kernel that comes here last: all others' work is visible to it.
__device__ bool comes_last(std::uint32_t* ticket) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = ptx::add_acquire_release(ticket, 1U) == gridDim.x - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  return last;
}

// By the last block: chunks behind each other, destinations behind each other.
__device__ void add_up_chunks(const CollectivePlan& plan) {
  for (int rank = warp_index(); rank < plan.ranks; rank += warps_of_block()) {
    const std::int32_t rows = exclusive_scan_column(plan.chunk_begin + rank, plan.ranks, gridDim.x);
    if (lane_index() == 0) *plan.sent(rank) = rows;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  std::int32_t sum = 0;
  for (int rank = 0; rank < plan.ranks; ++rank) {
    plan.sent_begin[rank] = sum;
    if (rank != plan.rank) sum += *plan.sent(rank);
  }
}

__global__ void __launch_bounds__(kCollectiveChunk) plan_collective(const __grid_constant__ CollectivePlanArgs args) {
  __shared__ PlanMemory memory;
  const CollectivePlan& plan = args.plan;
  const std::int32_t token = static_cast<std::int32_t>(blockIdx.x) * kCollectiveChunk + static_cast<std::int32_t>(threadIdx.x);
  const bool is_token = token < args.routing.num_tokens;
  const auto words = static_cast<int>(plan.words_per_rank());
  const bool few_counts = words <= kHistogramWords;
  std::int32_t* const counts = few_counts ? memory.counts : plan.mine();
  for (int i = threadIdx.x; few_counts && i < words; i += kCollectiveChunk) counts[i] = 0;
  __syncthreads();
  for (int first = 0; first < plan.ranks; first += kRankGroup) {
    number_chunk(plan, is_token ? mark_token(args, token, first, counts) : 0, is_token, first, memory);
  }
  for (int i = threadIdx.x; few_counts && i < words; i += kCollectiveChunk) {
    if (counts[i] != 0) atomicAdd(&plan.mine()[i], counts[i]);
  }
  if (comes_last(plan.ticket)) add_up_chunks(plan);
}

// By one block: where sources begin, and what the host waits for.
__device__ void tell_counts(const CollectivePackArgs& args) {
  const CollectivePlan& plan = args.plan;
  for (int rank = threadIdx.x; rank < plan.ranks; rank += kCollectiveThreads) {
    args.host->rows()[rank] = *plan.sent(rank);
    args.host->rows()[plan.ranks + rank] = *plan.received(rank);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence_system();
  ptx::store_release(&args.host->call, args.call);
  std::int32_t sum = 0;
  for (int rank = 0; rank < plan.ranks; ++rank) {
    plan.receive_begin[rank] = sum;
    sum += *plan.received(rank);
  }
  plan.receive_begin[plan.ranks] = sum;
}

// Where this rank's own rows begin among those it receives. By a whole warp.
__device__ std::int32_t own_begin(const CollectivePlan& plan) {
  std::int32_t sum = 0;
  for (int source = lane_index(); source < plan.rank; source += kLanes) sum += *plan.received(source);
  return __reduce_add_sync(kAllLanes, sum);
}

// Reads a piece of a row once and writes it to each lane's `to` of `lanes`. By a whole warp.
__device__ __forceinline__ void copy_piece(const std::byte* row, const RowPiece& piece, std::byte* to, unsigned lanes) {
  constexpr int kAtOnce = 4;  // loads under way
  for (int first = piece.begin; first < piece.end; first += kAtOnce * kLanes) {
    int4 x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int vector = first + i * kLanes + lane_index();
      if (vector < piece.end) x[i] = ptx::load_streaming(row + static_cast<std::int64_t>(vector) * kVectorBytes);
    }
    for (unsigned left = lanes; left != 0; left &= left - 1) {
      std::byte* const there = pointer_of(to, __ffs(static_cast<int>(left)) - 1);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int vector = first + i * kLanes + lane_index();
        if (vector < piece.end) ptx::store_streaming(there + static_cast<std::int64_t>(vector) * kVectorBytes, x[i]);
      }
    }
  }
}

// By a whole warp.
__device__ inline void copy_scales(const SourceArgs& source, std::int32_t token, std::byte* to) {
  const std::byte* const from = source.scales.data + token * source.scales.row_stride;
  for (int column = lane_index(); column < source.scale_columns; column += kLanes) {
    const std::byte* const scale = from + column * source.scales.column_stride;
    if (source.scale_element == 4) {
      reinterpret_cast<std::uint32_t*>(to)[column] = *reinterpret_cast<const std::uint32_t*>(scale);
    } else {
      for (int i = 0; i < source.scale_element; ++i) to[column * source.scale_element + i] = scale[i];
    }
  }
}

// A piece of a token to those of 32 ranks that it goes to; with its first piece go scales and records. By a whole warp.
__device__ void pack_piece(const CollectivePackArgs& args, const RowPiece& piece, int first_rank, std::int32_t own) {
  const CollectivePlan& plan = args.plan;
  const SourceArgs& source = args.source;
  const int rank = first_rank + lane_index();
  const std::int32_t number = row_number(plan, piece.token, rank);
  const unsigned lanes = __ballot_sync(kAllLanes, number >= 0);
  if (lanes == 0) return;
  const CollectiveTables& tables = rank == plan.rank ? args.received : args.packed;
  std::int64_t place = 0;
  if (number >= 0) place = number + (rank == plan.rank ? own : plan.sent_begin[rank]);
  copy_piece(source.rows + piece.token * source.row_stride, piece, tables.rows + place * source.row_bytes, lanes);
  if (piece.segment != 0) return;
  const TokenChoices choices = choices_of(args.routing, plan.rank, piece.token);
  const std::int64_t record_bytes = 8 + 8 * static_cast<std::int64_t>(args.routing.top_k);
  const std::int64_t scale_bytes = std::int64_t{source.scale_columns} * source.scale_element;
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    const int lane = __ffs(static_cast<int>(left)) - 1;
    if (source.scale_columns > 0) copy_scales(source, piece.token, pointer_of(tables.scales + place * scale_bytes, lane));
    write_record(pointer_of(tables.records + place * record_bytes, lane), {.source_token = piece.token}, choices,
                 local_ids_at(args.routing, choices, first_rank + lane), args.routing.top_k);
  }
}

__global__ void __launch_bounds__(kCollectiveThreads) pack_collective(const __grid_constant__ CollectivePackArgs args) {
  if (blockIdx.x == 0) tell_counts(args);
  const std::int32_t own = own_begin(args.plan);
  const int vectors = static_cast<int>(args.source.row_bytes / kVectorBytes);
  const RowCut cut = cut_rows(args.routing.num_tokens, vectors);
  const std::int64_t pieces = static_cast<std::int64_t>(args.routing.num_tokens) * cut.segments;
  for (std::int64_t n = grid_warp(); n < pieces; n += grid_warps()) {
    const RowPiece piece = RowPiece::of(cut, n, vectors);
    for (int first = 0; first < args.plan.ranks; first += kLanes) pack_piece(args, piece, first, own);
  }
}

// By one block: counts as the caller sees them; then they are zero for the next call.
__device__ void land_counts(const CollectiveLandArgs& args) {
  const CollectivePlan& plan = args.plan;
  for (int rank = threadIdx.x; rank < plan.ranks; rank += kCollectiveThreads) {
    args.rank_counts[rank] = *plan.received(rank);
    args.sent_counts[rank] = *plan.sent(rank);
  }
  for (int local = threadIdx.x; local < args.local_experts; local += kCollectiveThreads) {
    std::int32_t sum = 0;
    for (int source = 0; source < plan.ranks; ++source) sum += plan.received(source)[1 + local];
    args.expert_counts[local] = sum;
  }
  __syncthreads();
  for (int word = threadIdx.x; word < plan.words_per_rank(); word += kCollectiveThreads) plan.mine()[word] = 0;
}

__global__ void __launch_bounds__(kCollectiveThreads) land_collective(const __grid_constant__ CollectiveLandArgs args) {
  if (blockIdx.x == 0) land_counts(args);
  const int k = args.top_k;
  for (std::int64_t row = grid_warp(); row < args.num_rows; row += grid_warps()) {
    const auto* const record = reinterpret_cast<const std::int32_t*>(args.records) + row * (2 + 2 * k);
    for (int word = lane_index(); word < 2 + 2 * k; word += kLanes) {
      const std::int32_t value = record[word];
      if (word == 0) args.source_token[row] = value;
      if (word >= 2 + k)
        args.weights[row * k + word - 2 - k] = __int_as_float(value);
      else if (word >= 2)
        args.local_ids[row * k + word - 2] = value;
    }
    if (lane_index() != 0) continue;
    int source = 0;
    while (row >= args.plan.receive_begin[source + 1]) ++source;
    args.source_rank[row] = source;
  }
}

const Preloaded preloaded({{plan_collective}, {pack_collective}, {land_collective}});

int blocks_for(std::int64_t warps) {
  constexpr std::int64_t kMost = 1056;  // eight per multiprocessor
  return static_cast<int>(std::clamp<std::int64_t>((warps * kLanes + kCollectiveThreads - 1) / kCollectiveThreads, 1, kMost));
}

}  // namespace

void launch_collective_plan(const CollectivePlanArgs& args, Stream stream) {
  const int chunks = std::max(1, (args.routing.num_tokens + kCollectiveChunk - 1) / kCollectiveChunk);
  plan_collective<<<chunks, kCollectiveChunk, 0, stream>>>(args);
}
void launch_collective_pack(const CollectivePackArgs& args, Stream stream) {
  constexpr std::int64_t kPiecesPerToken = 8;  // so that a few tokens use many multiprocessors
  pack_collective<<<blocks_for(kPiecesPerToken * args.routing.num_tokens), kCollectiveThreads, 0, stream>>>(args);
}
void launch_collective_land(const CollectiveLandArgs& args, Stream stream) {
  land_collective<<<blocks_for(args.num_rows), kCollectiveThreads, 0, stream>>>(args);
}

}  // namespace tokenyard::cuda
