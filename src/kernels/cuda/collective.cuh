#pragma once
// What the kernels of the collective exchange share: where a token's row lies among those of a rank, and how work is cut.

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/collective.h"
#include "kernels/cuda/combine_arithmetic.h"
#include "kernels/cuda/numbers.cuh"

namespace tokenyard::cuda {

constexpr int kCollectiveThreads = 256;

// The number of the token's row among all those for `rank`; -1: it does not go there.
__device__ inline std::int32_t row_number(const CollectivePlan& plan, std::int32_t token, int rank) {
  if (rank >= plan.ranks) return -1;
  const std::int32_t slot = plan.slots[static_cast<std::int64_t>(token) * plan.ranks + rank];
  return slot < 0 ? -1 : slot + plan.chunk_begin[static_cast<std::int64_t>(token / kCollectiveChunk) * plan.ranks + rank];
}

// A piece of a token's row, for one warp: vectors [begin, end) of 16 bytes.
struct RowPiece {
  std::int32_t token = 0;
  int segment = 0;
  int begin = 0, end = 0;

  __device__ static RowPiece of(const RowCut& cut, std::int64_t n, int vectors) {
    const auto token = static_cast<std::int32_t>(n / cut.segments);
    const int segment = static_cast<int>(n - static_cast<std::int64_t>(token) * cut.segments);
    return {.token = token, .segment = segment, .begin = segment * cut.length, .end = min(vectors, (segment + 1) * cut.length)};
  }
};

// About one piece for each warp of the grid; RowCut makes four.
__device__ inline RowCut cut_rows(std::int32_t rows, int vectors) { return RowCut::of(rows, (grid_warps() + 3) / 4, vectors); }

// Lane `lane`'s pointer, in all lanes.
template <class T>
__device__ __forceinline__ T* pointer_of(T* mine, int lane) {
  return reinterpret_cast<T*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(mine), lane));
}

}  // namespace tokenyard::cuda
