#pragma once
// Layouts: which output row each received (row, k) becomes, and the metadata of the output. What landed has been counted as it came; a
// block for each chunk of rows sums up what all chunks hold, and then places its own.

#include "kernels/cuda/launch.h"
#include "kernels/cuda/layout_parts.cuh"

namespace tokenyard::cuda {

constexpr int kLayoutWarps = 32;

// The first row of a group that comes from `source` or a later one; rows lie in the order of their sources.
__device__ inline std::int32_t first_from(const std::int32_t* source_rank, std::int32_t rows, int source) {
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

__device__ inline void search_ranges(const LayoutArgs& args) {
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

// The chunk of this block; of a call that has failed, nothing.
__device__ inline void lay_out_chunk(const LayoutArgs& args, const LayoutMemory& layout, GroupsMemory& memory, int chunks) {
  const auto chunk = static_cast<int>(blockIdx.x);
  const bool failed = block_has_failed(args.context);
  if (!failed) sum_chunks(args, layout, chunk, chunks);
  __syncthreads();
  const bool fit = make_groups(args, layout.groups, memory, blockIdx.x == 0);
  if (blockIdx.x == 0 && threadIdx.x == 0) tell_groups(args, memory, fit);
  if (!failed) place_rows(args, layout, chunk_at(args, chunk));
  fill_rest(args, layout.groups, blockIdx.x, gridDim.x);
}

// This block's sums, zero; behind a barrier of its threads.
__device__ inline LayoutMemory clear_sums(const LayoutArgs& args, std::int32_t* shared) {
  const int columns = layout_columns(args);
  const std::int64_t words = protocol::layout_words(columns, warps_of_block());
  std::int32_t* const sums = columns > protocol::kMostSharedColumns ? args.table.sums + blockIdx.x * words : shared;
  for (int i = threadIdx.x; i < words; i += static_cast<int>(blockDim.x)) sums[i] = 0;
  return LayoutMemory(sums, columns);
}

// By the last block: the layout is complete.
__device__ inline void finish_layout(const LayoutArgs& args, int chunks) {
  for (int i = threadIdx.x; i < chunks * layout_columns(args); i += static_cast<int>(blockDim.x)) args.table.counts[i] = 0;
  if (args.layout == Layout::expert_padded) search_ranges(args);
  if (args.last) end_call(args.context);
}

// How a layout's kernel is started.
struct LayoutLaunch {
  int chunks;
  Launch launch;

  LayoutLaunch(const LayoutArgs& args, Stream stream, Resident resident) : LayoutLaunch(args, warps_for(args), stream, resident) {}

 private:
  // As many as there is room for the counts of.
  static int warps_for(const LayoutArgs& args) {
    const int columns = args.local_experts + 1;
    int warps = columns <= protocol::kMostSharedColumns ? kLayoutWarps : 1;
    while (warps > 1 && protocol::layout_words(columns, warps) * 4 > most_shared_bytes()) warps /= 2;
    return warps;
  }
  LayoutLaunch(const LayoutArgs& args, int warps, Stream stream, Resident resident)
      : chunks(static_cast<int>((args.context.shape.receive_rows + args.table.chunk_rows - 1) / args.table.chunk_rows)),
        launch(static_cast<int>(protocol::layout_blocks(args.context.shape)), warps * kLanes,
               args.local_experts < protocol::kMostSharedColumns
                   ? static_cast<std::size_t>(protocol::layout_words(args.local_experts + 1, warps) * 4)
                   : 0,
               stream, resident) {}
};

void launch_layout_beside(const LayoutArgs& args, Stream stream);

}  // namespace tokenyard::cuda
