// Gradients of what the layer itself computes: of the gate's product, of the shared expert's sigmoid, of the fold; and their sum. Sums are
// float32 and in an order that only shapes decide.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "core/preload.h"
#include "experts/cuda/elements.cuh"
#include "layer/cuda/block_sum.cuh"
#include "layer/cuda/kernels.h"

namespace tokenyard::layer_cuda {
namespace {

using experts_cuda::Floats;
using experts_cuda::kPerVector;
using experts_cuda::load_element;
using experts_cuda::load_piece;
using experts_cuda::store_element;
using experts_cuda::store_piece;
using experts_cuda::visit_rows;

constexpr int kTile = 64;  // rows and columns of a block, 4 x 4 of them of a thread
constexpr int kStep = 16;
constexpr int kEach = 4;

__global__ void __launch_bounds__(kThreads) product(const __grid_constant__ FactorsArgs args) {
  __shared__ float a[kStep][kTile + 1], b[kStep][kTile + 1];
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.y) * kTile,
                     first_column = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const int lane = static_cast<int>(threadIdx.x) % (kTile / kEach), line = static_cast<int>(threadIdx.x) / (kTile / kEach);
  float sums[kEach][kEach] = {};
  for (std::int64_t k = 0; k < args.terms; k += kStep) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kStep; i += kThreads) {
      const int at = i / kTile, across = i % kTile;
      const std::int64_t term = k + at, row = first_row + across, column = first_column + across;
      const bool is_term = term < args.terms;
      a[at][across] = is_term && row < args.rows ? args.a[row * args.a_row_stride + term * args.a_term_stride] : 0.0F;
      b[at][across] = is_term && column < args.columns ? read(args.b_dtype, args.b, term * args.b_stride + column) : 0.0F;
    }
    __syncthreads();
#pragma unroll
    for (int at = 0; at < kStep; ++at) {
#pragma unroll
      for (int i = 0; i < kEach * kEach; ++i) {
        float& sum = sums[i / kEach][i % kEach];
        sum = __fmaf_rn(a[at][line * kEach + i / kEach], b[at][lane + i % kEach * (kTile / kEach)], sum);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kEach * kEach; ++i) {
    const std::int64_t row = first_row + line * kEach + i / kEach, column = first_column + lane + i % kEach * (kTile / kEach);
    if (row >= args.rows || column >= args.columns) continue;
    float& out = args.out[row * args.columns + column];
    out = args.accumulates ? out + sums[i / kEach][i % kEach] : sums[i / kEach][i % kEach];
  }
}

__global__ void __launch_bounds__(kThreads) column_sums(const float* values, std::int64_t rows, std::int64_t columns, float* out) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  float sum = 0.0F;
  for (std::int64_t row = 0; row < rows; ++row) sum = sum + values[row * columns + column];
  out[column] = out[column] + sum;
}

// A block for each row.
template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) sigmoid_gradient(const __grid_constant__ SigmoidGradientArgs args) {
  const auto row = [](const std::byte* rows, std::int64_t stride) {
    return rows + static_cast<std::int64_t>(blockIdx.x) * stride * cuda::Format<kDtype>::kSize;
  };
  const std::byte *x = row(args.x, args.x_stride), *y = row(args.y, args.columns), *d_out = row(args.d_out, args.d_out_stride);
  auto* d_y = const_cast<std::byte*>(row(args.d_y, args.columns));
  float logit = 0.0F, projection = 0.0F;
  for (std::int64_t at = threadIdx.x; at < args.columns; at += kThreads) {
    logit = __fmaf_rn(load_element<kDtype>(x, at), read(args.gate_dtype, args.gate, at), logit);
    projection = __fmaf_rn(load_element<kDtype>(d_out, at), load_element<kDtype>(y, at), projection);
  }
  const float score = 1.0F / (1.0F + expf(-sum_of_block(logit)));
  const float sum = sum_of_block(projection);
  for (std::int64_t at = threadIdx.x; at < args.columns; at += kThreads)
    store_element<kDtype>(d_y, at, load_element<kDtype>(d_out, at) * score);
  if (threadIdx.x == 0) args.d_logits[blockIdx.x] = sum * score * (1.0F - score);
}

// A block for each place that has a row.
template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) weigh_gradient(const __grid_constant__ WeighGradientArgs args) {
  const std::int64_t places = min(static_cast<std::int64_t>(*args.num_places), args.max_places);
  for (std::int64_t place = blockIdx.x; place < places; place += gridDim.x) {
    std::byte* g = args.g + place * args.columns * cuda::Format<kDtype>::kSize;
    const std::byte* y = args.y + place * args.columns * cuda::Format<kDtype>::kSize;
    const float weight = args.weights[place];
    float sum = 0.0F;
    for (std::int64_t at = std::int64_t{threadIdx.x} * kPerVector<kDtype>; at < args.columns; at += kThreads * kPerVector<kDtype>) {
      Floats<kDtype> gradient = load_piece<kDtype>(g, at, args.columns);
      const Floats<kDtype> value = load_piece<kDtype>(y, at, args.columns);
#pragma unroll
      for (int i = 0; i < kPerVector<kDtype>; ++i) {
        sum = __fmaf_rn(gradient.at[i], value.at[i], sum);
        gradient.at[i] = gradient.at[i] * weight;
      }
      store_piece<kDtype>(g, at, args.columns, gradient);
    }
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) args.d_weights[place] = sum;
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) sum_gradients(const __grid_constant__ SumGradientsArgs args) {
  const std::int64_t row = blockIdx.x, begin = row * args.columns * cuda::Format<kDtype>::kSize;
  std::byte* out = args.out + row * args.out_stride * cuda::Format<kDtype>::kSize;
  for (std::int64_t at = threadIdx.x; at < args.columns; at += kThreads) {
    float sum = load_element<kDtype>(args.rows + begin, at);
    if (args.of_gate != nullptr) sum = sum + args.of_gate[row * args.columns + at];
    if (args.of_shared != nullptr) sum = sum + load_element<kDtype>(args.of_shared + begin, at);
    if (args.gate != nullptr) sum = __fmaf_rn(args.d_logits[row], read(args.gate_dtype, args.gate, at), sum);
    store_element<kDtype>(out, at, sum);
  }
}

const cuda::Preloaded preloaded({{product},
                                 {column_sums},
                                 {sigmoid_gradient<Dtype::float32>},
                                 {sigmoid_gradient<Dtype::bfloat16>},
                                 {sigmoid_gradient<Dtype::float16>},
                                 {weigh_gradient<Dtype::float32>},
                                 {weigh_gradient<Dtype::bfloat16>},
                                 {weigh_gradient<Dtype::float16>},
                                 {sum_gradients<Dtype::float32>},
                                 {sum_gradients<Dtype::bfloat16>},
                                 {sum_gradients<Dtype::float16>}});

}  // namespace

void product_of_factors(const FactorsArgs& args, Stream stream) {
  const auto tiles = [](std::int64_t count) { return static_cast<unsigned>((count + kTile - 1) / kTile); };
  if (args.rows == 0 || args.columns == 0) return;
  product<<<dim3(tiles(args.columns), tiles(args.rows)), kThreads, 0, stream>>>(args);
}

void add_column_sums(const float* values, std::int64_t rows, std::int64_t columns, float* out, Stream stream) {
  column_sums<<<static_cast<unsigned>((columns + kThreads - 1) / kThreads), kThreads, 0, stream>>>(values, rows, columns, out);
}

void differentiate_sigmoid(const SigmoidGradientArgs& args, Stream stream) {
  if (args.num_rows == 0) return;
  visit_rows(args.dtype, [&](auto rows) {
    sigmoid_gradient<decltype(rows)::value><<<static_cast<unsigned>(args.num_rows), kThreads, 0, stream>>>(args);
  });
}

void differentiate_weights(const WeighGradientArgs& args, int multiprocessors, Stream stream) {
  constexpr int kBlocksPerSm = 8;
  const auto blocks = static_cast<unsigned>(std::clamp<std::int64_t>(args.max_places, 1, std::int64_t{kBlocksPerSm} * multiprocessors));
  visit_rows(args.dtype, [&](auto rows) { weigh_gradient<decltype(rows)::value><<<blocks, kThreads, 0, stream>>>(args); });
}

void add_gradients(const SumGradientsArgs& args, Stream stream) {
  if (args.num_rows == 0) return;
  visit_rows(args.dtype,
             [&](auto rows) { sum_gradients<decltype(rows)::value><<<static_cast<unsigned>(args.num_rows), kThreads, 0, stream>>>(args); });
}

}  // namespace tokenyard::layer_cuda
