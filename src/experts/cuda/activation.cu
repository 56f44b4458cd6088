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
constexpr int kBlocksPerSm = 4;  // what registers leave room for

template <Dtype kDtype, bool kWhole>
__global__ void __launch_bounds__(kThreads) forward(const __grid_constant__ ActivationArgs args) {
  constexpr int kAtOnce = 2, kStep = kLanes * kPerVector<kDtype>;
  const Gated gated = {args.activation};
  const int width = args.width;
  const std::int64_t row_bytes = static_cast<std::int64_t>(width) * Format<kDtype>::kSize;
  for_each_place(args.groups, [&](std::int64_t place) {
    const std::byte* gate_row = args.gate_up + 2 * place * row_bytes;
    for (int first = lane_index() * kPerVector<kDtype>; first < width; first += kAtOnce * kStep) {
      int4 gate[kAtOnce], up[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * kStep >= width) continue;
        gate[i] = load_packed<kDtype, kWhole>(gate_row, first + i * kStep, width);
        up[i] = load_packed<kDtype, kWhole>(gate_row + row_bytes, first + i * kStep, width);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * kStep >= width) continue;
        const auto g = Floats<kDtype>::of(gate[i]);
        auto act = Floats<kDtype>::of(up[i]);
#pragma unroll
        for (int e = 0; e < kPerVector<kDtype>; ++e) act.at[e] = gated.value(g.at[e], act.at[e]);
        store_packed<kDtype, kWhole>(args.act + place * row_bytes, first + i * kStep, width, act);
      }
    }
  });
}

template <Dtype kDtype, bool kWhole>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ ActivationArgs args) {
  constexpr int kStep = kLanes * kPerVector<kDtype>;
  const Gated gated = {args.activation};
  const int width = args.width;
  const std::int64_t row_bytes = static_cast<std::int64_t>(width) * Format<kDtype>::kSize;
  for_each_place(args.groups, [&](std::int64_t place) {
    const std::byte* gate_row = args.gate_up + 2 * place * row_bytes;
    std::byte* d_gate_row = args.d_gate_up + 2 * place * row_bytes;
    for (int first = lane_index() * kPerVector<kDtype>; first < width; first += kStep) {
      const int4 packed[] = {load_packed<kDtype, kWhole>(gate_row, first, width),
                             load_packed<kDtype, kWhole>(gate_row + row_bytes, first, width),
                             load_packed<kDtype, kWhole>(args.d_act + place * row_bytes, first, width)};
      const auto gate = Floats<kDtype>::of(packed[0]);
      auto up = Floats<kDtype>::of(packed[1]), d = Floats<kDtype>::of(packed[2]);
      Floats<kDtype> act;
#pragma unroll
      for (int e = 0; e < kPerVector<kDtype>; ++e) {
        act.at[e] = gated.value(gate.at[e], up.at[e]);
        up.at[e] = gated.differentiate(gate.at[e], up.at[e], d.at[e]);
      }
      store_packed<kDtype, kWhole>(args.act + place * row_bytes, first, width, act);
      store_packed<kDtype, kWhole>(d_gate_row, first, width, d);
      store_packed<kDtype, kWhole>(d_gate_row + row_bytes, first, width, up);
    }
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

const cuda::Preloaded preloaded({{forward<Dtype::float32, true>},
                                 {forward<Dtype::float32, false>},
                                 {forward<Dtype::bfloat16, true>},
                                 {forward<Dtype::bfloat16, false>},
                                 {forward<Dtype::float16, true>},
                                 {forward<Dtype::float16, false>},
                                 {backward<Dtype::float32, true>},
                                 {backward<Dtype::float32, false>},
                                 {backward<Dtype::bfloat16, true>},
                                 {backward<Dtype::bfloat16, false>},
                                 {backward<Dtype::float16, true>},
                                 {backward<Dtype::float16, false>},
                                 {column_sums<Dtype::float32>},
                                 {column_sums<Dtype::bfloat16>},
                                 {column_sums<Dtype::float16>}});

template <class Fn>
void visit_activation(const ActivationArgs& args, Fn&& fn) {
  visit_rows(args.dtype, are_whole(cuda::kVectorBytes, args.dtype, args.width, args.gate_up, args.act, args.d_act, args.d_gate_up), fn);
}

}  // namespace

void activate(const ActivationArgs& args, int num_sms, Stream stream) {
  visit_activation(
      args, [&](auto dtype, auto whole) { forward<dtype.value, whole.value><<<num_sms * kBlocksPerSm, kThreads, 0, stream>>>(args); });
}

void activate_backward(const ActivationArgs& args, int num_sms, Stream stream) {
  visit_activation(
      args, [&](auto dtype, auto whole) { backward<dtype.value, whole.value><<<num_sms * kBlocksPerSm, kThreads, 0, stream>>>(args); });
}

void add_column_sums(const ColumnSumArgs& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>((args.columns + kSumColumns - 1) / kSumColumns), static_cast<unsigned>(args.groups.num_groups));
  if (grid.x == 0 || grid.y == 0) return;
  visit_rows(args.dtype, [&](auto dtype) { column_sums<dtype.value><<<grid, dim3(kSumColumns, kSumRows), 0, stream>>>(args); });
}

}  // namespace tokenyard::experts_cuda
