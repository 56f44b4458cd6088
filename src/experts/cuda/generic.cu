// Grouped products of any shape, type and alignment, on any GPU: for what the Hopper kernels cannot take. Rows are gathered on the
// way to shared memory.

#include <cuda_runtime.h>

#include "core/preload.h"
#include "experts/cuda/kernels.h"
#include "experts/cuda/tiles.cuh"

namespace tokenyard::experts_cuda {
namespace {

// The tiles of all groups, dealt to blocks in turn; a block looks at each group once.
struct TileWalk {
  std::int64_t tile = 0;        // of all
  std::int64_t first_tile = 0;  // of the group
  int group = 0;
};

// m, n: of the result of a group; k: what is summed over.
struct Extent {
  std::int64_t m = 0, n = 0, k = 0;
  __device__ std::int64_t tiles_n() const { return (n + kTile - 1) / kTile; }
  __device__ std::int64_t tiles() const { return k == 0 ? 0 : (m + kTile - 1) / kTile * tiles_n(); }
};

template <Product kProduct>
__device__ __forceinline__ Extent extent_of(const GroupedArgs& args, const Span& span) {
  if (kProduct == Product::wgrad) return {args.n, args.k, span.count};
  return {span.count, args.n, args.k};
}

template <Product kProduct>
__device__ __forceinline__ Operand operand_a(const GroupedArgs& args, const Span& span, int bytes) {
  if (kProduct == Product::wgrad) return {args.w + span.begin * args.w_stride * bytes, args.w_stride, nullptr, 0, span.count, args.n};
  if (args.x_rows == nullptr) return {args.x + span.begin * args.x_stride * bytes, args.x_stride, nullptr, 0, span.count, args.k};
  return {args.x, args.x_stride, args.x_rows + span.begin, args.num_rows, span.count, args.k};
}

template <Product kProduct>
__device__ __forceinline__ Operand operand_b(const GroupedArgs& args, const Span& span, int group, int bytes) {
  const std::int64_t matrix = static_cast<std::int64_t>(group) * args.n * args.k;
  if (kProduct == Product::forward) return {args.w + matrix * bytes, args.k, nullptr, 0, args.n, args.k};
  if (kProduct == Product::dgrad) return {args.w + matrix * bytes, args.n, nullptr, 0, args.k, args.n};
  if (args.x_rows == nullptr) return {args.x + span.begin * args.x_stride * bytes, args.x_stride, nullptr, 0, span.count, args.k};
  return {args.x, args.x_stride, args.x_rows + span.begin, args.num_rows, span.count, args.k};
}

// The sums of a tile go to y.
template <class Element, Product kProduct>
struct Output {
  const GroupedArgs& args;
  Extent extent;
  Span span;
  int group;

  __device__ __forceinline__ void write(std::int64_t m, std::int64_t n, float sum) const {
    if (kProduct == Product::wgrad) {
      float* to = reinterpret_cast<float*>(args.y) + (static_cast<std::int64_t>(group) * args.n + m) * args.k + n;
      *to = *to + sum;
      return;
    }
    if (kProduct == Product::forward && args.bias != nullptr) {
      sum = sum + static_cast<float>(reinterpret_cast<const Element*>(args.bias)[static_cast<std::int64_t>(group) * args.n + n]);
    }
    reinterpret_cast<Element*>(args.y)[(span.begin + m) * args.y_stride + n] = Element(sum);
  }
  __device__ __forceinline__ void write_tile(std::int64_t m0, std::int64_t n0, const float* sums) const {
    for (int at = static_cast<int>(threadIdx.x); at < kTile * kTile; at += kBlockThreads) {
      const std::int64_t m = m0 + at / kTile, n = n0 + at % kTile;
      if (m < extent.m && n < extent.n) write(m, n, sums[at / kTile * (kTile + 4) + at % kTile]);
    }
  }
};

template <class Element, Product kProduct>
__global__ void __launch_bounds__(kBlockThreads) product(const __grid_constant__ GroupedArgs args) {
  constexpr bool kAOuterIsM = kProduct != Product::wgrad, kBOuterIsN = kProduct == Product::forward;
  using Sums = TileSums<Element, kAOuterIsM, kBOuterIsN>;
  constexpr int kRowsA = kAOuterIsM ? kTile : kDepth, kRowsB = kBOuterIsN ? kTile : kDepth;
  __shared__ alignas(32) Element a[kRowsA * Sums::PieceA::kStride];
  __shared__ alignas(32) Element b[kRowsB * Sums::PieceB::kStride];
  __shared__ alignas(32) float sums[kTile * (kTile + 4)];
  TileWalk walk = {static_cast<std::int64_t>(blockIdx.x), 0, 0};
  for (; walk.group < args.groups.num_groups; ++walk.group) {
    const Span span = span_of(args.groups, walk.group);
    const Extent extent = extent_of<kProduct>(args, span);
    const Operand from_a = operand_a<kProduct>(args, span, sizeof(Element));
    const Operand from_b = operand_b<kProduct>(args, span, walk.group, sizeof(Element));
    for (; walk.tile < walk.first_tile + extent.tiles(); walk.tile += gridDim.x) {
      const std::int64_t m0 = (walk.tile - walk.first_tile) / extent.tiles_n() * kTile;
      const std::int64_t n0 = (walk.tile - walk.first_tile) % extent.tiles_n() * kTile;
      Sums tile;
      typename Sums::PieceA next_a;
      typename Sums::PieceB next_b;
      const auto load = [&](std::int64_t k) {
        next_a.load(from_a, kAOuterIsM ? m0 : k, kAOuterIsM ? k : m0);
        next_b.load(from_b, kBOuterIsN ? n0 : k, kBOuterIsN ? k : n0);
      };
      load(0);
      for (std::int64_t k = 0; k < extent.k; k += kDepth) {
        __syncthreads();  // the last pieces have been read
        next_a.store(a);
        next_b.store(b);
        __syncthreads();
        if (k + kDepth < extent.k) load(k + kDepth);
        tile.add(a, b);
      }
      tile.store(sums);
      __syncthreads();
      Output<Element, kProduct>{args, extent, span, walk.group}.write_tile(m0, n0, sums);
      __syncthreads();  // sums are the next tile's
    }
    walk.first_tile += extent.tiles();
  }
}

template <class Element>
void launch(const GroupedArgs& args, int blocks, Stream stream) {
  if (args.product == Product::forward) product<Element, Product::forward><<<blocks, kBlockThreads, 0, stream>>>(args);
  if (args.product == Product::dgrad) product<Element, Product::dgrad><<<blocks, kBlockThreads, 0, stream>>>(args);
  if (args.product == Product::wgrad) product<Element, Product::wgrad><<<blocks, kBlockThreads, 0, stream>>>(args);
}

const cuda::Preloaded preloaded({{product<float, Product::forward>},
                                 {product<float, Product::dgrad>},
                                 {product<float, Product::wgrad>},
                                 {product<__nv_bfloat16, Product::forward>},
                                 {product<__nv_bfloat16, Product::dgrad>},
                                 {product<__nv_bfloat16, Product::wgrad>},
                                 {product<__half, Product::forward>},
                                 {product<__half, Product::dgrad>},
                                 {product<__half, Product::wgrad>}});

}  // namespace

void grouped_product(const GroupedArgs& args, int num_sms, Stream stream) {
  constexpr int kBlocksPerSm = 4;
  const int blocks = num_sms * kBlocksPerSm;
  if (args.dtype == Dtype::bfloat16) launch<__nv_bfloat16>(args, blocks, stream);
  if (args.dtype == Dtype::float16) launch<__half>(args, blocks, stream);
  if (args.dtype == Dtype::float32) launch<float>(args, blocks, stream);
}

}  // namespace tokenyard::experts_cuda
