// Layouts: which output row each received (row, k) becomes, and the metadata of the output. What landed has been counted as it came; a
// block for each chunk of rows sums up what all chunks hold, and then places its own.

#include "core/preload.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/layout_parts.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kLayoutWarps = 32;

enum Ticket { kPlacedTicket };

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

// By the last block: the layout is complete.
__device__ void finish_layout(const LayoutArgs& args, int chunks) {
  for (int i = threadIdx.x; i < chunks * layout_columns(args); i += static_cast<int>(blockDim.x)) args.table.counts[i] = 0;
  if (args.layout == Layout::expert_padded) search_ranges(args);
  if (args.last) end_call(args.context);
}

__global__ void __launch_bounds__(kLayoutWarps* kLanes, 1) lay_out(const __grid_constant__ LayoutArgs args, int chunks) {
  extern __shared__ std::int32_t shared[];
  __shared__ GroupsMemory memory;
  const int columns = layout_columns(args);
  const std::int64_t words = protocol::layout_words(columns, warps_of_block());
  std::int32_t* const sums = columns > protocol::kMostSharedColumns ? args.table.sums + blockIdx.x * words : shared;
  const LayoutMemory layout(sums, columns);
  const auto chunk = static_cast<int>(blockIdx.x);
  for (int i = threadIdx.x; i < words; i += static_cast<int>(blockDim.x)) sums[i] = 0;
  const bool failed = block_has_failed(args.context);
  if (!failed) sum_chunks(args, layout, chunk, chunks);
  __syncthreads();
  const bool fit = make_groups(args, layout.groups, memory, blockIdx.x == 0);
  if (blockIdx.x == 0 && threadIdx.x == 0) tell_groups(args, memory, fit);
  if (!failed) place_rows(args, layout, chunk_at(args, chunk));
  fill_rest(args, layout.groups);
  if (is_last_block(args.context, kPlacedTicket)) finish_layout(args, chunks);
}

const Preloaded preloaded({{lay_out, kAllSharedMemory}});

}  // namespace

void launch_layout(const LayoutArgs& args, Stream stream) {
  const std::int64_t rows = args.context.shape.receive_rows;
  const auto chunks = static_cast<int>((rows + args.table.chunk_rows - 1) / args.table.chunk_rows);
  const int columns = args.local_experts + 1;
  const bool is_shared = columns <= protocol::kMostSharedColumns;
  int warps = is_shared ? kLayoutWarps : 1;  // as many as there is room for the counts of
  while (warps > 1 && protocol::layout_words(columns, warps) * 4 > most_shared_bytes()) warps /= 2;
  const std::int64_t bytes = is_shared ? protocol::layout_words(columns, warps) * 4 : 0;
  const auto blocks = static_cast<int>(protocol::layout_blocks(args.context.shape));
  const Launch launch(blocks, warps * kLanes, static_cast<std::size_t>(bytes), stream, Resident::any);
  launch(lay_out, args, chunks);
}

}  // namespace tokenyard::cuda
