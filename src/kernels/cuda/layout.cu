// Layouts: which output row each received (row, k) becomes, and the metadata of the output. Large batches take three kernels;
// in latency mode a small one takes one, whose blocks all count everything and then place a share each.

#include <algorithm>

#include "kernels/cuda/layout_parts.cuh"
#include "kernels/cuda/preload.h"

namespace tokenyard::cuda {
namespace {

constexpr int kCountThreads = 128;
constexpr int kScanThreads = 1024;
constexpr int kPlaceWarps = 4;
constexpr int kPlaceThreads = kPlaceWarps * kLanes;
constexpr int kSmallThreads = 1024;
constexpr int kSmallBlocks = 32;
constexpr std::int64_t kSmallPairs = 32768;
constexpr std::int64_t kSharedWords = 11 * 1024;  // of dynamic shared memory without asking for more
constexpr int kFillBlocks = 128;

enum Ticket { kScanTicket, kPlaceTicket, kSmallTicket };

// Rows that can hold anything: in throughput mode what arrived, in latency mode all slots.
__device__ std::int32_t used_rows(const LayoutArgs& args) {
  if (args.mode == Mode::throughput) return args.handle.header->num_rows;
  return static_cast<std::int32_t>(received_capacity(args.context, args.mode));
}

__device__ Chunk chunk_at(std::int64_t chunk, std::int32_t rows) {
  return {static_cast<std::int32_t>(min(chunk * kLayoutChunk, std::int64_t{rows})),
          static_cast<std::int32_t>(min((chunk + 1) * kLayoutChunk, std::int64_t{rows}))};
}

__global__ void __launch_bounds__(kCountThreads) count_chunks(const __grid_constant__ LayoutArgs args, bool in_shared) {
  extern __shared__ std::int32_t shared[];
  const int columns = layout_columns(args);
  const Chunk chunk = chunk_at(blockIdx.x, used_rows(args));
  if (chunk.begin == chunk.end) return;
  std::int32_t* row = args.chunk_counts + static_cast<std::int64_t>(blockIdx.x) * columns;
  std::int32_t* counters = in_shared ? shared : row;
  for (int column = threadIdx.x; column < columns; column += kCountThreads) counters[column] = 0;
  __syncthreads();
  count_rows(args, chunk, counters, static_cast<int>(threadIdx.x), kCountThreads);
  __syncthreads();
  for (int column = threadIdx.x; in_shared && column < columns; column += kCountThreads) row[column] = shared[column];
}

__global__ void __launch_bounds__(kScanThreads) scan_chunks(const __grid_constant__ LayoutArgs args) {
  __shared__ GroupsMemory memory;
  const int columns = layout_columns(args);
  const std::int64_t chunks = (std::int64_t{used_rows(args)} + kLayoutChunk - 1) / kLayoutChunk;
  const int column = static_cast<int>(blockIdx.x) * (kScanThreads / kLanes) + warp_index();
  if (column < columns) {
    const std::int32_t count = exclusive_scan_column(args.chunk_counts + column, columns, chunks, 0);
    if (lane_index() == 0 && column < args.local_experts) args.handle.expert_counts[column] = count;
  }
  if (!is_last_block(args.context, kScanTicket)) return;
  const bool fit = make_groups(args, {args.handle.expert_counts, args.handle.expert_offsets}, memory, true);
  if (threadIdx.x == 0) tell_groups(args, memory, fit);
}

// The first row of a group that comes from `source` or a later one; rows lie in the order of their sources.
__device__ std::int32_t first_from(const std::int32_t* source_rank, std::int32_t rows, int source) {
  std::int32_t low = 0, high = rows;
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    if (source_rank[middle] < source) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ void search_ranges(const LayoutArgs& args) {
  const HandleView& handle = args.handle;
  const int ranks = args.context.ranks;
  for (std::int64_t i = threadIdx.x; i < std::int64_t{args.local_experts} * ranks; i += blockDim.x) {
    const auto local = static_cast<int>(i / ranks);
    const auto source = static_cast<int>(i % ranks);
    const std::int32_t* group = handle.out_source_rank + local * args.expert_capacity;
    const std::int32_t begin = first_from(group, handle.expert_counts[local], source);
    handle.ranges[2 * i] = begin;
    handle.ranges[2 * i + 1] = first_from(group, handle.expert_counts[local], source + 1) - begin;
  }
}

__global__ void __launch_bounds__(kPlaceThreads) place_chunks(const __grid_constant__ LayoutArgs args, bool in_shared) {
  extern __shared__ std::int32_t shared[];
  const int columns = layout_columns(args);
  const Groups groups{args.handle.expert_counts, args.handle.expert_offsets};
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kPlaceWarps + warp_index();
  const Chunk chunk = chunk_at(index, static_cast<std::int32_t>(received_capacity(args.context, args.mode)));
  std::int32_t* counters = args.chunk_counts + index * columns;
  // A chunk behind the rows that arrived has no counters, and asks for none.
  if (in_shared && chunk.begin < used_rows(args)) {
    std::int32_t* mine = shared + warp_index() * columns;
    for (int column = lane_index(); column < columns; column += kLanes) mine[column] = counters[column];
    __syncwarp();
    counters = mine;
  }
  if (chunk.begin < chunk.end) place_rows(args, groups, chunk, counters);
  fill_rest(args, groups);
  const bool wants_ranges = args.layout == Layout::expert_padded;
  if (!wants_ranges && !args.last) return;
  if (!is_last_block(args.context, kPlaceTicket)) return;
  if (wants_ranges) search_ranges(args);
  if (args.last) end_call(args.context);
}

// Chunks of the small kernel lie within one source each.
__device__ Chunk small_chunk(const LayoutArgs& args, int chunk, int per_source) {
  const auto tokens = static_cast<std::int32_t>(args.context.shape.max_tokens_per_rank);
  const std::int32_t first = chunk / per_source * tokens;
  const std::int32_t rows = (tokens + per_source - 1) / per_source;
  const std::int32_t begin = min(chunk % per_source * rows, tokens);
  return {first + begin, first + min(begin + rows, tokens)};
}

// The table says where the rows of every source begin.
__device__ void read_ranges(const LayoutArgs& args, const Groups& groups, const std::int32_t* table, int per_source) {
  const int ranks = args.context.ranks;
  const int columns = layout_columns(args);
  for (int i = threadIdx.x; i < args.local_experts * ranks; i += kSmallThreads) {
    const int local = i / ranks;
    const int source = i % ranks;
    const std::int32_t kept = groups.kept[local];
    const std::int32_t begin = min(table[source * per_source * columns + local], kept);
    const std::int32_t end = source + 1 < ranks ? min(table[(source + 1) * per_source * columns + local], kept) : kept;
    args.handle.ranges[2 * i] = begin;
    args.handle.ranges[2 * i + 1] = end - begin;
  }
}

__global__ void __launch_bounds__(kSmallThreads, 1) lay_out_small(const __grid_constant__ LayoutArgs args, int per_source) {
  extern __shared__ std::int32_t table[];
  __shared__ GroupsMemory memory;
  const int columns = layout_columns(args);
  const int chunks = args.context.ranks * per_source;
  const Groups groups{table + chunks * columns, table + chunks * columns + args.local_experts};
  for (int i = threadIdx.x; i < chunks * columns; i += kSmallThreads) table[i] = 0;
  __syncthreads();
  for (int chunk = warp_index(); chunk < chunks; chunk += warps_of_block()) {
    count_rows(args, small_chunk(args, chunk, per_source), table + chunk * columns, lane_index(), kLanes);
  }
  __syncthreads();
  for (int column = warp_index(); column < columns; column += warps_of_block()) {
    const std::int32_t count = exclusive_scan_column(table + column, columns, chunks, 0);
    if (lane_index() == 0 && column < args.local_experts) groups.kept[column] = count;
  }
  __syncthreads();
  const bool fit = make_groups(args, groups, memory, blockIdx.x == 0);
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) tell_groups(args, memory, fit);
    if (args.layout == Layout::expert_padded) read_ranges(args, groups, table, per_source);
  }
  __syncthreads();  // placing changes the table
  const int blocks = static_cast<int>(gridDim.x);
  for (int chunk = static_cast<int>(blockIdx.x) + blocks * warp_index(); chunk < chunks; chunk += blocks * warps_of_block()) {
    place_rows(args, groups, small_chunk(args, chunk, per_source), table + chunk * columns);
  }
  fill_rest(args, groups);
  if (args.last && is_last_block(args.context, kSmallTicket)) end_call(args.context);
}

const Preloaded preloaded({{count_chunks}, {scan_chunks}, {place_chunks}, {lay_out_small}});

bool launch_small(const LayoutArgs& args, Stream stream) {
  const protocol::ArenaShape& shape = args.context.shape;
  if (args.mode != Mode::latency || shape.ranks * shape.max_tokens_per_rank * args.handle.top_k > kSmallPairs) return false;
  const std::int64_t per_source = std::max<std::int64_t>(1, kSmallThreads / kLanes / shape.ranks);
  const std::int64_t words = shape.ranks * per_source * (args.local_experts + 1) + 2 * args.local_experts + 1;
  if (words > kSharedWords) return false;
  lay_out_small<<<kSmallBlocks, kSmallThreads, static_cast<std::size_t>(words) * 4, stream>>>(args, static_cast<int>(per_source));
  return true;
}

}  // namespace

void launch_layout(const LayoutArgs& given, Stream stream) {
  LayoutArgs args = given;
  const protocol::ArenaShape& shape = args.context.shape;
  if (args.layout == Layout::expert_padded && args.expert_capacity == 0) args.expert_capacity = shape.receive_rows;
  if (launch_small(args, stream)) return;
  const std::int64_t rows = args.mode == Mode::latency ? shape.ranks * shape.max_tokens_per_rank : shape.receive_rows;
  const auto chunks = static_cast<unsigned>((rows + kLayoutChunk - 1) / kLayoutChunk);
  const auto columns = static_cast<unsigned>(args.local_experts + 1);
  const bool counts_in_shared = columns <= kSharedWords;
  count_chunks<<<chunks, kCountThreads, counts_in_shared ? columns * 4 : 0, stream>>>(args, counts_in_shared);
  scan_chunks<<<(columns + kLanes - 1) / kLanes, kScanThreads, 0, stream>>>(args);
  const bool places_in_shared = kPlaceWarps * columns <= kSharedWords;
  const unsigned place_blocks = std::max<unsigned>((chunks + kPlaceWarps - 1) / kPlaceWarps, kFillBlocks);
  place_chunks<<<place_blocks, kPlaceThreads, places_in_shared ? kPlaceWarps * columns * 4 : 0, stream>>>(args, places_in_shared);
}

}  // namespace tokenyard::cuda
