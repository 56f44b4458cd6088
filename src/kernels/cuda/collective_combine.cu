// The combine of the collective exchange, and of reduce_scatter_v: sums in rank order.

#include <algorithm>

#include "core/preload.h"
#include "kernels/cuda/collective.cuh"
#include "kernels/cuda/ordered_sum.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kColumns = 4;  // vectors of a lane under way

// What 32 ranks returned of a token: lane l has the row of rank first + l.
struct Terms {
  const std::byte* row = nullptr;
  unsigned lanes = 0;

  __device__ static Terms of(const CollectiveSumArgs& args, std::int32_t token, int first) {
    const CollectivePlan& plan = args.plan;
    const int rank = first + lane_index();
    const std::int32_t number = row_number(plan, token, rank);
    Terms terms{.lanes = __ballot_sync(kAllLanes, number >= 0)};
    if (number < 0) return terms;
    terms.row = rank == plan.rank ? args.own + std::int64_t{number} * args.row_bytes
                                  : args.returned + (std::int64_t{number} + plan.sent_begin[rank]) * args.row_bytes;
    return terms;
  }
};

template <Dtype kDtype>
__device__ __forceinline__ void add_terms(const Terms& terms, int first, int end, Floats<kDtype> (&sums)[kColumns]) {
  for (unsigned left = terms.lanes; left != 0; left &= left - 1) {
    const std::byte* const row = pointer_of(terms.row, __ffs(static_cast<int>(left)) - 1);
    int4 x[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int vector = first + c * kLanes + lane_index();
      if (vector < end) x[c] = ptx::load_streaming(row + static_cast<std::int64_t>(vector) * kVectorBytes);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (first + c * kLanes + lane_index() < end) sums[c].add(Floats<kDtype>::of(x[c]));
    }
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kCollectiveThreads) sum_collective(const __grid_constant__ CollectiveSumArgs args) {
  const int vectors = args.row_bytes / kVectorBytes;
  const RowCut cut = cut_rows(args.num_tokens, vectors);
  const std::int64_t pieces = static_cast<std::int64_t>(args.num_tokens) * cut.segments;
  for (std::int64_t n = grid_warp(); n < pieces; n += grid_warps()) {
    const RowPiece piece = RowPiece::of(cut, n, vectors);
    const Terms first_terms = Terms::of(args, piece.token, 0);
    for (int first = piece.begin; first < piece.end; first += kColumns * kLanes) {
      Floats<kDtype> sums[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[c] = Floats<kDtype>::zero();
      add_terms<kDtype>(first_terms, first, piece.end, sums);
      for (int rank = kLanes; rank < args.plan.ranks; rank += kLanes) {
        add_terms<kDtype>(Terms::of(args, piece.token, rank), first, piece.end, sums);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int vector = first + c * kLanes + lane_index();
        if (vector < piece.end) store_sums(args.out + piece.token * args.out_pitch, vector, sums[c].at, args.out_dtype);
      }
    }
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kCollectiveThreads) sum_in_order(const __grid_constant__ OrderedSumArgs args) {
  using Stored = typename ElementSum<kDtype>::Word;
  const auto* const own = reinterpret_cast<const Stored*>(args.own);
  const auto* const others = reinterpret_cast<const Stored*>(args.others);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kCollectiveThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kCollectiveThreads + threadIdx.x; i < args.elements; i += step) {
    ElementSum<kDtype> sum;
    for (int rank = 0; rank < args.ranks; ++rank) sum.add(rank == args.rank ? own[i] : others[rank * args.elements + i]);
    reinterpret_cast<Stored*>(args.out)[i] = sum.rounded();
  }
}

const Preloaded preloaded({{sum_collective<Dtype::float32>},
                           {sum_collective<Dtype::bfloat16>},
                           {sum_collective<Dtype::float16>},
                           {sum_in_order<Dtype::float64>},
                           {sum_in_order<Dtype::float32>},
                           {sum_in_order<Dtype::bfloat16>},
                           {sum_in_order<Dtype::float16>}});

int blocks_for(std::int64_t threads) {
  constexpr std::int64_t kMost = 1056;  // eight per multiprocessor
  return static_cast<int>(std::clamp<std::int64_t>((threads + kCollectiveThreads - 1) / kCollectiveThreads, 1, kMost));
}

}  // namespace

void launch_collective_sum(const CollectiveSumArgs& args, Stream stream) {
  constexpr std::int64_t kPiecesPerToken = 8;  // so that a few tokens use many multiprocessors
  const int blocks = blocks_for(kPiecesPerToken * kLanes * args.num_tokens);
  if (args.dtype == Dtype::float32) {
    sum_collective<Dtype::float32><<<blocks, kCollectiveThreads, 0, stream>>>(args);
  } else if (args.dtype == Dtype::bfloat16) {
    sum_collective<Dtype::bfloat16><<<blocks, kCollectiveThreads, 0, stream>>>(args);
  } else {
    sum_collective<Dtype::float16><<<blocks, kCollectiveThreads, 0, stream>>>(args);
  }
}

void launch_ordered_sum(const OrderedSumArgs& args, Stream stream) {
  const int blocks = blocks_for(args.elements);
  switch (args.dtype) {
    case Dtype::float64:
      sum_in_order<Dtype::float64><<<blocks, kCollectiveThreads, 0, stream>>>(args);
      return;
    case Dtype::float32:
      sum_in_order<Dtype::float32><<<blocks, kCollectiveThreads, 0, stream>>>(args);
      return;
    case Dtype::bfloat16:
      sum_in_order<Dtype::bfloat16><<<blocks, kCollectiveThreads, 0, stream>>>(args);
      return;
    default:
      sum_in_order<Dtype::float16><<<blocks, kCollectiveThreads, 0, stream>>>(args);
  }
}

}  // namespace tokenyard::cuda
