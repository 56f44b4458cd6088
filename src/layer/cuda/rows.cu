// The shared expert's sigmoid, its sum with the others where no exchange adds them, and how many rows ranks have.

#include <cuda_runtime.h>

#include "core/preload.h"
#include "experts/cuda/elements.cuh"
#include "layer/cuda/block_sum.cuh"
#include "layer/cuda/kernels.h"
#include "protocol/lanes.h"

namespace tokenyard::layer_cuda {
namespace {

using experts_cuda::Floats;
using experts_cuda::kPerVector;
using experts_cuda::load_element;
using experts_cuda::load_piece;
using experts_cuda::store_piece;
using experts_cuda::visit_rows;

template <Dtype kDtype>
__device__ __forceinline__ const std::byte* row_of(const std::byte* rows, std::int64_t stride) {
  return rows + static_cast<std::int64_t>(blockIdx.x) * stride * cuda::Format<kDtype>::kSize;
}

// A block for each row.
template <Dtype kDtype, Dtype kGate>
__global__ void __launch_bounds__(kThreads) scale(const __grid_constant__ RowsArgs args, const std::byte* gate) {
  const std::byte* x = row_of<kDtype>(args.a, args.a_stride);
  const std::byte* y = row_of<kDtype>(args.b, args.b_stride);
  auto* out = const_cast<std::byte*>(row_of<kDtype>(args.out, args.out_stride));
  float sum = 0.0F;
  for (std::int64_t at = threadIdx.x; at < args.columns; at += kThreads)
    sum = __fmaf_rn(load_element<kDtype>(x, at), load_element<kGate>(gate, at), sum);
  const float score = 1.0F / (1.0F + expf(-sum_of_block(sum)));
  for (std::int64_t first = std::int64_t{threadIdx.x} * kPerVector<kDtype>; first < args.columns; first += kThreads * kPerVector<kDtype>) {
    Floats<kDtype> piece = load_piece<kDtype>(y, first, args.columns);
#pragma unroll
    for (float& value : piece.at) value = value * score;
    store_piece<kDtype>(out, first, args.columns, piece);
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) add(const __grid_constant__ RowsArgs args) {
  const std::byte* a = row_of<kDtype>(args.a, args.a_stride);
  const std::byte* b = row_of<kDtype>(args.b, args.b_stride);
  auto* out = const_cast<std::byte*>(row_of<kDtype>(args.out, args.out_stride));
  for (std::int64_t first = std::int64_t{threadIdx.x} * kPerVector<kDtype>; first < args.columns; first += kThreads * kPerVector<kDtype>) {
    Floats<kDtype> sum = load_piece<kDtype>(a, first, args.columns);
    const Floats<kDtype> other = load_piece<kDtype>(b, first, args.columns);
#pragma unroll
    for (int i = 0; i < kPerVector<kDtype>; ++i) sum.at[i] = sum.at[i] + other.at[i];
    store_piece<kDtype>(out, first, args.columns, sum);
  }
}

__global__ void sum_counts(const std::int32_t* counts, int ranks, std::int64_t most, std::int32_t* total) {
  *total = static_cast<std::int32_t>(protocol::counted_rows_before(counts, ranks, most));
}

const cuda::Preloaded preloaded({
    {sum_counts},
    {scale<Dtype::float32, Dtype::float32>},
    {scale<Dtype::float32, Dtype::bfloat16>},
    {scale<Dtype::float32, Dtype::float16>},
    {scale<Dtype::bfloat16, Dtype::float32>},
    {scale<Dtype::bfloat16, Dtype::bfloat16>},
    {scale<Dtype::bfloat16, Dtype::float16>},
    {scale<Dtype::float16, Dtype::float32>},
    {scale<Dtype::float16, Dtype::bfloat16>},
    {scale<Dtype::float16, Dtype::float16>},
    {add<Dtype::float32>},
    {add<Dtype::bfloat16>},
    {add<Dtype::float16>},
});

}  // namespace

void scale_by_gate(const RowsArgs& args, const std::byte* gate, Dtype gate_dtype, Stream stream) {
  if (args.num_rows == 0) return;
  visit_rows(args.dtype, [&](auto rows) {
    visit_rows(gate_dtype, [&](auto gates) {
      scale<decltype(rows)::value, decltype(gates)::value><<<static_cast<unsigned>(args.num_rows), kThreads, 0, stream>>>(args, gate);
    });
  });
}

void add_counts(const std::int32_t* counts, int ranks, std::int64_t most, std::int32_t* total, Stream stream) {
  sum_counts<<<1, 1, 0, stream>>>(counts, ranks, most, total);
}

void add_rows(const RowsArgs& args, Stream stream) {
  if (args.num_rows == 0) return;
  visit_rows(args.dtype,
             [&](auto rows) { add<decltype(rows)::value><<<static_cast<unsigned>(args.num_rows), kThreads, 0, stream>>>(args); });
}

}  // namespace tokenyard::layer_cuda
