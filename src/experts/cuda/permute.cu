// From rows to places and back.

#include <cuda_runtime.h>

#include <algorithm>

#include "core/preload.h"
#include "experts/cuda/elements.cuh"
#include "experts/cuda/kernels.h"

namespace tokenyard::experts_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;

unsigned blocks_for(std::int64_t pieces, std::int64_t per_block) {
  constexpr std::int64_t kMostBlocks = 4096;  // enough to fill any device; more only takes turns
  return static_cast<unsigned>(std::clamp<std::int64_t>((pieces + per_block - 1) / per_block, 1, kMostBlocks));
}

template <class Vector>
__device__ __forceinline__ void copy_row(const std::byte* from, std::byte* to, std::int64_t bytes) {
  const std::int64_t count = bytes / static_cast<std::int64_t>(sizeof(Vector));
#pragma unroll 4
  for (std::int64_t i = lane_index(); i < count; i += kLanes) {
    reinterpret_cast<Vector*>(to)[i] = from == nullptr ? Vector() : reinterpret_cast<const Vector*>(from)[i];
  }
}

// A warp takes one place after the other.
__global__ void __launch_bounds__(kThreads) permute_kernel(const __grid_constant__ PermuteArgs args, bool is_aligned) {
  for_each_place(args.groups, [&](std::int64_t place) {
    const std::int64_t row = args.rows == nullptr ? place : args.rows[place];
    const std::byte* from = row < 0 || row >= args.num_rows ? nullptr : args.from + row * args.from_stride;
    std::byte* to = args.to + place * args.to_stride;
    if (is_aligned) {
      copy_row<int4>(from, to, args.row_bytes);
    } else {
      copy_row<std::uint8_t>(from, to, args.row_bytes);
    }
  });
}

// A warp takes one place after the other.
__global__ void __launch_bounds__(kThreads) clear_padding_kernel(const __grid_constant__ PaddingArgs args, bool is_aligned) {
  for (std::int64_t place = grid_warp(); place < args.groups.places; place += grid_warps()) {
    if (args.groups.num_groups > 0 && group_of(args.groups, place) >= 0) continue;
    std::byte* row = args.rows + place * args.stride;
    if (is_aligned) {
      copy_row<int4>(nullptr, row, args.row_bytes);
    } else {
      copy_row<std::uint8_t>(nullptr, row, args.row_bytes);
    }
  }
}

constexpr int kGatherThreads = 1024;

// The sum of the threads before this one, and of all. By all threads of a block.
__device__ __forceinline__ int sum_before(int value, int* total) {
  __shared__ int of_warps[kGatherThreads / kLanes];
  const int lane = static_cast<int>(threadIdx.x) % kLanes, warp = static_cast<int>(threadIdx.x) / kLanes;
  const int inclusive = cuda::inclusive_sum(value);
  __syncthreads();  // the last sums have been read
  if (lane == kLanes - 1) of_warps[warp] = inclusive;
  __syncthreads();
  int before = inclusive - value;
  *total = 0;
  for (int w = 0; w < kGatherThreads / kLanes; ++w) {
    if (w < warp) before += of_warps[w];
    *total += of_warps[w];
  }
  return before;
}

// A block per group. Two kernels, since where a group begins depends on the counts of those before it.
__global__ void __launch_bounds__(kGatherThreads) count_kernel(const __grid_constant__ GatherArgs args) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  int mine = 0;
  for (std::int64_t at = threadIdx.x; at < args.num_ids; at += kGatherThreads) mine += args.local_ids[at] == static_cast<int>(blockIdx.x);
  if (mine > 0) atomicAdd(&count, mine);
  __syncthreads();
  if (threadIdx.x == 0) args.counts[blockIdx.x] = count;
}

__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const __grid_constant__ GatherArgs args) {
  __shared__ int begin;
  const int group = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) begin = 0;
  __syncthreads();
  int mine = 0;
  for (int g = static_cast<int>(threadIdx.x); g < group; g += kGatherThreads) mine += args.counts[g];
  if (mine > 0) atomicAdd(&begin, mine);
  __syncthreads();
  if (threadIdx.x == 0) args.begins[group] = begin;
  constexpr int kIdsAtOnce = 16;
  std::int32_t next = begin;
  for (std::int64_t first = 0; first < args.num_ids; first += kGatherThreads * kIdsAtOnce) {
    const std::int64_t at = first + static_cast<std::int64_t>(threadIdx.x) * kIdsAtOnce;
    unsigned here = 0;  // a bit for each of this thread's ids
#pragma unroll
    for (int i = 0; i < kIdsAtOnce; ++i) here |= at + i < args.num_ids && args.local_ids[at + i] == group ? 1U << i : 0U;
    int total = 0;
    std::int32_t place = next + sum_before(__popc(here), &total);
    for (; here != 0; here &= here - 1)
      args.rows[place++] = static_cast<std::int32_t>((at + __ffs(static_cast<int>(here)) - 1) / args.top_k);
    next += total;
  }
}

__global__ void __launch_bounds__(kThreads) clear_places(const __grid_constant__ FoldArgs args) {
  const std::int64_t terms = args.num_rows * args.top_k;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < terms; at += step) args.place_of[at] = -1;
}

// Places of one group and one row follow each other in the order of k.
__global__ void __launch_bounds__(kThreads) find_places_kernel(const __grid_constant__ FoldArgs args) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t place = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; place < args.groups.places; place += step) {
    const int group = group_of(args.groups, place);
    if (group < 0) continue;
    const std::int32_t row = args.rows[place];
    if (row < 0 || row >= args.num_rows) continue;
    int skip = 0;
    for (std::int64_t before = place - 1; before >= begin_of(args.groups, group) && args.rows[before] == row; --before) ++skip;
    for (int k = 0; k < args.top_k; ++k) {
      const std::int64_t term = static_cast<std::int64_t>(row) * args.top_k + k;
      if (args.local_ids[term] == group && skip-- == 0) args.place_of[term] = static_cast<std::int32_t>(place);
    }
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) fold_kernel(const __grid_constant__ FoldArgs args) {
  constexpr int kSize = Format<kDtype>::kSize;
  const std::int64_t pieces = (args.columns + kPerVector<kDtype> - 1) / kPerVector<kDtype>;
  for (std::int64_t row = blockIdx.x; row < args.num_rows; row += gridDim.x) {
    for (std::int64_t piece = threadIdx.x; piece < pieces; piece += kThreads) {
      const std::int64_t first = piece * kPerVector<kDtype>;
      auto sum = Floats<kDtype>::zero();
      for (int k = 0; k < args.top_k; ++k) {
        const std::int64_t term = row * args.top_k + k;
        const std::int32_t place = args.place_of[term];
        if (place < 0) continue;
        const float weight = args.row_weights == nullptr ? 1.0F : args.row_weights[term];
        sum.add_product(weight, load_piece<kDtype>(args.places + place * args.places_stride * kSize, first, args.columns));
      }
      store_piece<kDtype>(args.out + row * args.out_stride * kSize, first, args.columns, sum);
    }
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) unfold_kernel(const __grid_constant__ FoldArgs args) {
  constexpr int kSize = Format<kDtype>::kSize;
  constexpr int kDotLanes = 16;  // of cpu::dot: half a warp works on one term, in its order
  const std::int64_t terms = args.num_rows * args.top_k;
  const int lane = static_cast<int>(threadIdx.x) % kDotLanes;
  for (std::int64_t pair = grid_warp() * 2; pair < terms; pair += grid_warps() * 2) {
    const std::int64_t term = pair + threadIdx.x / kDotLanes % 2;
    const std::int32_t place = term < terms ? args.place_of[term] : -1;
    float sum = 0.0F;
    if (place >= 0) {
      const float weight = args.row_weights == nullptr ? 1.0F : args.row_weights[term];
      const std::byte* d_out = args.d_out + term / args.top_k * args.out_stride * kSize;
      std::byte* d_place = args.d_places + place * args.d_places_stride * kSize;
#pragma unroll 4
      for (std::int64_t i = lane; i < args.columns; i += kDotLanes) {
        const float d = load_element<kDtype>(d_out, i);
        if (args.d_row_weights != nullptr) {
          sum = fmaf(d, load_element<kDtype>(args.places + place * args.places_stride * kSize, i), sum);
        }
        store_element<kDtype>(d_place, i, weight * d);
      }
    }
    __syncwarp();
#pragma unroll
    for (int width = kDotLanes / 2; width > 0; width /= 2) sum = sum + __shfl_down_sync(kAllLanes, sum, width, kDotLanes);
    if (args.d_row_weights != nullptr && term < terms && lane == 0) args.d_row_weights[term] = sum;
  }
}

const cuda::Preloaded preloaded({{permute_kernel},
                                 {clear_padding_kernel},
                                 {count_kernel},
                                 {gather_kernel},
                                 {clear_places},
                                 {find_places_kernel},
                                 {fold_kernel<Dtype::float32>},
                                 {fold_kernel<Dtype::bfloat16>},
                                 {fold_kernel<Dtype::float16>},
                                 {unfold_kernel<Dtype::float32>},
                                 {unfold_kernel<Dtype::bfloat16>},
                                 {unfold_kernel<Dtype::float16>}});

}  // namespace

void permute(const PermuteArgs& args, Stream stream) {
  if (args.groups.places == 0 || args.groups.num_groups == 0) return;
  const auto bits = reinterpret_cast<std::uintptr_t>(args.from) | reinterpret_cast<std::uintptr_t>(args.to) |
                    static_cast<std::uintptr_t>(args.from_stride | args.to_stride | args.row_bytes);
  permute_kernel<<<blocks_for(args.groups.places, kWarps), kThreads, 0, stream>>>(args, bits % sizeof(int4) == 0);
}

void clear_padding(const PaddingArgs& args, Stream stream) {
  if (args.groups.places == 0) return;
  const auto bits = reinterpret_cast<std::uintptr_t>(args.rows) | static_cast<std::uintptr_t>(args.stride | args.row_bytes);
  clear_padding_kernel<<<blocks_for(args.groups.places, kWarps), kThreads, 0, stream>>>(args, bits % sizeof(int4) == 0);
}

void gather_groups(const GatherArgs& args, Stream stream) {
  if (args.num_groups == 0) return;
  count_kernel<<<static_cast<unsigned>(args.num_groups), kGatherThreads, 0, stream>>>(args);
  gather_kernel<<<static_cast<unsigned>(args.num_groups), kGatherThreads, 0, stream>>>(args);
}

void find_places(const FoldArgs& args, Stream stream) {
  if (args.num_rows == 0) return;
  clear_places<<<blocks_for(args.num_rows * args.top_k, kThreads), kThreads, 0, stream>>>(args);
  if (args.groups.places > 0) find_places_kernel<<<blocks_for(args.groups.places, kThreads), kThreads, 0, stream>>>(args);
}

void unpermute(const FoldArgs& args, Stream stream) {
  if (args.num_rows == 0 || args.columns == 0) return;
  visit_rows(args.dtype, [&](auto dtype) { fold_kernel<dtype.value><<<blocks_for(args.num_rows, 1), kThreads, 0, stream>>>(args); });
}

void unpermute_backward(const FoldArgs& args, Stream stream) {
  const std::int64_t terms = args.num_rows * args.top_k;
  if (terms == 0) return;
  visit_rows(args.dtype, [&](auto dtype) { unfold_kernel<dtype.value><<<blocks_for(terms, 2 * kWarps), kThreads, 0, stream>>>(args); });
}

}  // namespace tokenyard::experts_cuda
