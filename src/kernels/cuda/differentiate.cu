// The gradients of a weighted combine on the rank of the experts, before they travel back.

#include <algorithm>

#include "kernels/cuda/combine_parts.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kDotLanes = 16;  // of cpu::dot: half a warp works on one row
constexpr int kHalves = kLanes / kDotLanes;
constexpr int kDifferentiateThreads = 512;

template <Dtype kDtype>
using Element = std::conditional_t<kDtype == Dtype::float32, float, std::uint16_t>;

template <Dtype kDtype>
__device__ __forceinline__ float to_float(Element<kDtype> element) {
  if constexpr (kDtype == Dtype::float32) {
    return element;
  } else {
    float pair[2];
    Format<kDtype>::unpack(element, pair);
    return pair[0];
  }
}
template <Dtype kDtype>
__device__ __forceinline__ Element<kDtype> from_float(float value) {
  const float pair[2] = {value, 0.0F};
  const unsigned word = Format<kDtype>::pack(pair);
  if constexpr (kDtype == Dtype::float32) {
    return __uint_as_float(word);
  } else {
    return static_cast<std::uint16_t>(word);
  }
}

// This lane's sum of g * y over every kDotLanes-th element; g becomes weight * g. Loads of a batch are under way at once.
template <Dtype kDtype>
__device__ __forceinline__ float multiply_row(Element<kDtype>* g, const Element<kDtype>* y, float weight, int elements) {
  constexpr int kBatch = 8;
  float sum = 0.0F;
  int i = static_cast<int>(threadIdx.x % kDotLanes);
#pragma unroll 1
  for (; i + (kBatch - 1) * kDotLanes < elements; i += kBatch * kDotLanes) {
    float gradients[kBatch], values[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      gradients[j] = to_float<kDtype>(g[i + j * kDotLanes]);
      values[j] = to_float<kDtype>(y[i + j * kDotLanes]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      sum = fmaf(gradients[j], values[j], sum);
      g[i + j * kDotLanes] = from_float<kDtype>(weight * gradients[j]);
    }
  }
#pragma unroll 1
  for (; i < elements; i += kDotLanes) {
    const float gradient = to_float<kDtype>(g[i]);
    sum = fmaf(gradient, to_float<kDtype>(y[i]), sum);
    g[i] = from_float<kDtype>(weight * gradient);
  }
  return sum;
}

template <Dtype kDtype>
__device__ void differentiate_rows(const DifferentiateArgs& args) {
  const int top_k = args.handle.top_k;
  const std::int64_t terms = static_cast<std::int64_t>(args.handle.source_begin[args.shape.ranks]) * top_k;
  const std::int64_t half = threadIdx.x / kDotLanes % kHalves;
  // Both halves of a warp go round equally often: they shuffle together.
  for (std::int64_t first = grid_warp() * kHalves; first < terms; first += grid_warps() * kHalves) {
    const std::int64_t term = first + half;
    const std::int64_t i = term / top_k;
    const int k = static_cast<int>(term - i * top_k);
    const bool is_there = term < terms && args.handle.source_token[i] >= 0;
    const std::int32_t row = is_there ? args.handle.output_row[term] : -1;
    float sum = 0.0F;
    if (row >= 0) {
      auto* const g = reinterpret_cast<Element<kDtype>*>(args.g + row * args.g_pitch);
      const auto* const y = reinterpret_cast<const Element<kDtype>*>(args.y + row * args.y_pitch);
      sum = multiply_row<kDtype>(g, y, args.weights[i * args.weights_pitch + k], args.elements);
    }
    __syncwarp();
#pragma unroll
    for (int width = kDotLanes / 2; width > 0; width /= 2) sum = sum + __shfl_down_sync(kAllLanes, sum, width, kDotLanes);
    if (row >= 0 && threadIdx.x % kDotLanes == 0) args.row_gradient[row] = sum;
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kDifferentiateThreads) differentiate_kernel(const __grid_constant__ DifferentiateArgs args) {
  differentiate_rows<kDtype>(args);
}

const Preloaded preloaded({{differentiate_kernel<Dtype::float32>},
                           {differentiate_kernel<Dtype::bfloat16>},
                           {differentiate_kernel<Dtype::float16>}});

}  // namespace

void launch_differentiate(const DifferentiateArgs& args, Stream stream) {
  if (args.output_rows == 0) return;
  cudaMemsetAsync(args.row_gradient, 0, static_cast<std::size_t>(args.output_rows) * sizeof(float), stream);
  constexpr std::int64_t kTermsPerBlock = kDifferentiateThreads / kDotLanes;
  constexpr std::int64_t kMostBlocks = 1024;  // enough to fill any device; more only takes turns
  const std::int64_t terms = args.shape.receive_rows * args.handle.top_k;
  const std::int64_t blocks = std::clamp<std::int64_t>((terms + kTermsPerBlock - 1) / kTermsPerBlock, 1, kMostBlocks);
  visit_combined(args.dtype, [&](auto dtype) {
    differentiate_kernel<dtype.value><<<static_cast<unsigned>(blocks), kDifferentiateThreads, 0, stream>>>(args);
  });
}

}  // namespace tokenyard::cuda
