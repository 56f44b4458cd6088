// Residual + RMSNorm and its gradients: a block for each row, sums in float32, in an order that only shapes decide.

#include <cuda_runtime.h>

#include "core/preload.h"
#include "experts/cuda/elements.cuh"
#include "layer/cuda/block_sum.cuh"
#include "layer/cuda/kernels.h"
#include "layer/norm_arithmetic.h"

namespace tokenyard::layer_cuda {
namespace {

using experts_cuda::Floats;
using experts_cuda::kPerVector;
using experts_cuda::load_element;
using experts_cuda::load_piece;
using experts_cuda::store_piece;
using experts_cuda::visit_rows;
using layer_internal::norm_gradient;
using layer_internal::normed;

template <Dtype kDtype>
__device__ __forceinline__ std::byte* row_of(const std::byte* rows, std::int64_t stride) {
  return const_cast<std::byte*>(rows) + static_cast<std::int64_t>(blockIdx.x) * stride * cuda::Format<kDtype>::kSize;
}

// step(first) for each piece of a row that is this thread's.
template <Dtype kDtype, class Step>
__device__ __forceinline__ void for_each_piece(std::int64_t columns, Step&& step) {
  constexpr int kPieces = kPerVector<kDtype>;
  for (std::int64_t first = std::int64_t{threadIdx.x} * kPieces; first < columns; first += kThreads * kPieces) step(first);
}

// Behind the end of a row nothing is read; a piece has zeros there.
__device__ __forceinline__ float weight_at(const std::byte* weight, Dtype dtype, std::int64_t at, std::int64_t columns) {
  return at < columns ? read(dtype, weight, at) : 0.0F;
}

__device__ __forceinline__ float inverse_of(float squares, std::int64_t columns, float epsilon) {
  return 1.0F / sqrtf(squares / static_cast<float>(columns) + epsilon);
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) norm(const __grid_constant__ NormArgs args) {
  const std::byte* x = row_of<kDtype>(args.x, args.x_stride);
  const std::byte* residual = row_of<kDtype>(args.residual, args.residual_stride);
  std::byte* kept = row_of<kDtype>(args.kept, args.kept_stride);
  std::byte* out = row_of<kDtype>(args.out, args.out_stride);
  float squares = 0.0F;
  for_each_piece<kDtype>(args.columns, [&](std::int64_t first) {
    Floats<kDtype> sum = load_piece<kDtype>(x, first, args.columns);
    if (args.bias != nullptr) sum.add(load_piece<kDtype>(args.bias, first, args.columns));
    if (args.residual != nullptr) sum.add(load_piece<kDtype>(residual, first, args.columns));
    store_piece<kDtype>(kept, first, args.columns, sum);
    const Floats<kDtype> rounded = Floats<kDtype>::of(sum.packed());  // backward has no other
#pragma unroll
    for (const float value : rounded.at) squares = __fmaf_rn(value, value, squares);
  });
  const float inverse = inverse_of(sum_of_block(squares), args.columns, args.epsilon);
  if (args.inverse != nullptr && threadIdx.x == 0) args.inverse[blockIdx.x] = inverse;
  for_each_piece<kDtype>(args.columns, [&](std::int64_t first) {
    Floats<kDtype> piece = load_piece<kDtype>(kept, first, args.columns);  // what this thread has stored
#pragma unroll
    for (int i = 0; i < kPerVector<kDtype>; ++i)
      piece.at[i] = normed(piece.at[i], inverse, weight_at(args.weight, args.weight_dtype, first + i, args.columns));
    store_piece<kDtype>(out, first, args.columns, piece);
  });
}

// d_x may be d_residual or d_out: the block has read its row of d_out once before it writes, and reads a piece again before it writes it.
template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) norm_backward(const __grid_constant__ NormGradientArgs args) {
  const std::byte* kept = row_of<kDtype>(args.kept, args.kept_stride);
  const std::byte* d_out = row_of<kDtype>(args.d_out, args.d_out_stride);
  const std::byte* d_residual = row_of<kDtype>(args.d_residual, args.d_residual_stride);
  std::byte* d_x = row_of<kDtype>(args.d_x, args.d_x_stride);
  const auto scaled = [&](const Floats<kDtype>& gradient, std::int64_t first, int i) {
    return gradient.at[i] * weight_at(args.weight, args.weight_dtype, first + i, args.columns);
  };
  float squares = 0.0F, projection = 0.0F;
  for_each_piece<kDtype>(args.columns, [&](std::int64_t first) {
    const Floats<kDtype> row = load_piece<kDtype>(kept, first, args.columns), gradient = load_piece<kDtype>(d_out, first, args.columns);
#pragma unroll
    for (int i = 0; i < kPerVector<kDtype>; ++i) {
      squares = __fmaf_rn(row.at[i], row.at[i], squares);
      projection = __fmaf_rn(scaled(gradient, first, i), row.at[i], projection);
    }
  });
  const float inverse = inverse_of(sum_of_block(squares), args.columns, args.epsilon);
  const float mean = sum_of_block(projection) * inverse * inverse / static_cast<float>(args.columns);
  for_each_piece<kDtype>(args.columns, [&](std::int64_t first) {
    const Floats<kDtype> row = load_piece<kDtype>(kept, first, args.columns), gradient = load_piece<kDtype>(d_out, first, args.columns);
    Floats<kDtype> sum = args.d_residual != nullptr ? load_piece<kDtype>(d_residual, first, args.columns) : Floats<kDtype>::zero();
#pragma unroll
    for (int i = 0; i < kPerVector<kDtype>; ++i)
      sum.at[i] = sum.at[i] + norm_gradient(scaled(gradient, first, i), row.at[i], inverse, mean);
    store_piece<kDtype>(d_x, first, args.columns, sum);
  });
}

constexpr int kColumns = 32;  // of a block, which has as many lines of threads, each with its own rows
constexpr int kLines = 32;

template <Dtype kDtype>
__global__ void __launch_bounds__(kColumns* kLines) norm_weight(const __grid_constant__ NormGradientArgs args) {
  __shared__ float sums[kLines][kColumns];
  const int lane = static_cast<int>(threadIdx.x) % kColumns, line = static_cast<int>(threadIdx.x) / kColumns;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kColumns + lane;
  constexpr int kSize = cuda::Format<kDtype>::kSize;
  float sum = 0.0F;
  if (column < args.columns) {
#pragma unroll 4
    for (std::int64_t row = line; row < args.num_rows; row += kLines) {
      const float gradient = load_element<kDtype>(args.d_out + row * args.d_out_stride * kSize, column);
      const float value = load_element<kDtype>(args.kept + row * args.kept_stride * kSize, column);
      sum = sum + gradient * value * args.inverse[row];
    }
  }
  sums[line][lane] = sum;
  __syncthreads();
  if (line != 0 || column >= args.columns) return;
  float total = 0.0F;
  for (const auto& of_line : sums) total = total + of_line[lane];
  args.d_weight[column] = args.d_weight[column] + total;
}

const cuda::Preloaded preloaded({{norm<Dtype::float32>},
                                 {norm<Dtype::bfloat16>},
                                 {norm<Dtype::float16>},
                                 {norm_backward<Dtype::float32>},
                                 {norm_backward<Dtype::bfloat16>},
                                 {norm_backward<Dtype::float16>},
                                 {norm_weight<Dtype::float32>},
                                 {norm_weight<Dtype::bfloat16>},
                                 {norm_weight<Dtype::float16>}});

}  // namespace

void norm_rows(const NormArgs& args, Stream stream) {
  if (args.num_rows == 0 || args.columns == 0) return;
  visit_rows(args.dtype,
             [&](auto rows) { norm<decltype(rows)::value><<<static_cast<unsigned>(args.num_rows), kThreads, 0, stream>>>(args); });
}

void differentiate_norm(const NormGradientArgs& args, Stream stream) {
  if (args.num_rows == 0 || args.columns == 0) return;
  visit_rows(args.dtype, [&](auto rows) {
    constexpr Dtype kRows = decltype(rows)::value;
    const auto blocks = static_cast<unsigned>((args.columns + kColumns - 1) / kColumns);
    if (args.d_weight != nullptr) norm_weight<kRows><<<blocks, kColumns * kLines, 0, stream>>>(args);  // before d_x overwrites d_out
    norm_backward<kRows><<<static_cast<unsigned>(args.num_rows), kThreads, 0, stream>>>(args);
  });
}

}  // namespace tokenyard::layer_cuda
