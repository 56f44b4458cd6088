// The gated activation by place, forward and backward, and the sums that biases' gradients are.

#include <cuda_runtime.h>

#include <algorithm>

#include "core/preload.h"
#include "experts/cuda/elements.cuh"
#include "experts/cuda/gated.cuh"
#include "experts/cuda/kernels.h"

namespace tokenyard::experts_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;

// Calls fn(place, first element of a piece) for all pieces of rows of `width` of all groups.
template <class Fn>
__device__ __forceinline__ void for_each_piece(const Groups& groups, int width, int per_piece, Fn&& fn) {
  const std::int64_t pieces = (width + per_piece - 1) / per_piece;
  std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x, first = 0;
  for (int g = 0; g < groups.num_groups; ++g) {
    const Span span = span_of(groups, g);
    for (; at < first + span.count * pieces; at += static_cast<std::int64_t>(gridDim.x) * kThreads) {
      fn(span.begin + (at - first) / pieces, (at - first) % pieces * per_piece);
    }
    first += span.count * pieces;
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) forward(const __grid_constant__ ActivationArgs args) {
  const Gated gated = {args.activation};
  const std::int64_t row_bytes = static_cast<std::int64_t>(args.width) * Format<kDtype>::kSize;
  for_each_piece(args.groups, args.width, kPerVector<kDtype>, [&](std::int64_t place, std::int64_t first) {
    const std::byte* gate_row = args.gate_up + 2 * place * row_bytes;
    const auto gate = load_piece<kDtype>(gate_row, first, args.width);
    auto up = load_piece<kDtype>(gate_row + row_bytes, first, args.width);
#pragma unroll
    for (int i = 0; i < kPerVector<kDtype>; ++i) up.at[i] = gated.value(gate.at[i], up.at[i]);
    store_piece<kDtype>(args.act + place * row_bytes, first, args.width, up);
  });
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ ActivationArgs args) {
  const Gated gated = {args.activation};
  const std::int64_t row_bytes = static_cast<std::int64_t>(args.width) * Format<kDtype>::kSize;
  for_each_piece(args.groups, args.width, kPerVector<kDtype>, [&](std::int64_t place, std::int64_t first) {
    const std::byte* gate_row = args.gate_up + 2 * place * row_bytes;
    const auto gate = load_piece<kDtype>(gate_row, first, args.width);
    auto up = load_piece<kDtype>(gate_row + row_bytes, first, args.width);
    auto d = load_piece<kDtype>(args.d_act + place * row_bytes, first, args.width);
    Floats<kDtype> act;
#pragma unroll
    for (int i = 0; i < kPerVector<kDtype>; ++i) {
      act.at[i] = gated.value(gate.at[i], up.at[i]);
      up.at[i] = gated.differentiate(gate.at[i], up.at[i], d.at[i]);
    }
    std::byte* d_gate_row = args.d_gate_up + 2 * place * row_bytes;
    store_piece<kDtype>(args.act + place * row_bytes, first, args.width, act);
    store_piece<kDtype>(d_gate_row, first, args.width, d);
    store_piece<kDtype>(d_gate_row + row_bytes, first, args.width, up);
  });
}

constexpr int kSumColumns = 32;
constexpr int kSumRows = 16;

// A block has a group and kSumColumns columns; its rows take turns, and their sums are added in order.
template <Dtype kDtype>
__global__ void __launch_bounds__(kSumColumns* kSumRows) column_sums(const __grid_constant__ ColumnSumArgs args) {
  __shared__ float parts[kSumRows][kSumColumns];
  const Span span = span_of(args.groups, static_cast<int>(blockIdx.y));
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  float sum = 0.0F;
  for (std::int64_t i = threadIdx.y; i < span.count && column < args.columns; i += kSumRows) {
    sum = sum + load_element<kDtype>(args.values + (span.begin + i) * args.stride * Format<kDtype>::kSize, column);
  }
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= args.columns) return;
  float total = 0.0F;
  for (int row = 0; row < kSumRows; ++row) total = total + parts[row][threadIdx.x];
  float* to = args.sums + blockIdx.y * args.columns + column;
  *to = *to + total;
}

const cuda::Preloaded preloaded({{forward<Dtype::float32>},
                                 {forward<Dtype::bfloat16>},
                                 {forward<Dtype::float16>},
                                 {backward<Dtype::float32>},
                                 {backward<Dtype::bfloat16>},
                                 {backward<Dtype::float16>},
                                 {column_sums<Dtype::float32>},
                                 {column_sums<Dtype::bfloat16>},
                                 {column_sums<Dtype::float16>}});

}  // namespace

void activate(const ActivationArgs& args, int num_sms, Stream stream) {
  visit_rows(args.dtype, [&](auto dtype) { forward<dtype.value><<<num_sms * kBlocksPerSm, kThreads, 0, stream>>>(args); });
}

void activate_backward(const ActivationArgs& args, int num_sms, Stream stream) {
  visit_rows(args.dtype, [&](auto dtype) { backward<dtype.value><<<num_sms * kBlocksPerSm, kThreads, 0, stream>>>(args); });
}

void add_column_sums(const ColumnSumArgs& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>((args.columns + kSumColumns - 1) / kSumColumns), static_cast<unsigned>(args.groups.num_groups));
  if (grid.x == 0 || grid.y == 0) return;
  visit_rows(args.dtype, [&](auto dtype) { column_sums<dtype.value><<<grid, dim3(kSumColumns, kSumRows), 0, stream>>>(args); });
}

}  // namespace tokenyard::experts_cuda
