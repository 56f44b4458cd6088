// The gate's product. Rows and weights of one half type go to the tensor cores, whose products of them are exact; others are multiplied
// in float32. Either way sums are float32 and in an order that only shapes decide.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <algorithm>

#include "core/preload.h"
#include "experts/cuda/elements.cuh"
#include "layer/cuda/block_sum.cuh"
#include "layer/cuda/kernels.h"

namespace tokenyard::layer_cuda {
namespace {

constexpr int kTile = 64;        // tokens and experts of a block
constexpr int kStep = 64;        // of H at a time, on tensor cores
constexpr int kPlainStep = 16;   // and without
constexpr int kBlocksPerSm = 2;  // aimed at

// Where the block's tile lies, and its part of H.
struct Tile {
  std::int64_t token;
  int expert, first, last;
  __device__ __forceinline__ Tile(const GateProductArgs& args, int part_size)
      : token(static_cast<std::int64_t>(blockIdx.x) * kTile),
        expert(static_cast<int>(blockIdx.y) * kTile),
        first(static_cast<int>(blockIdx.z) * part_size),
        last(min(args.hidden_size, first + part_size)) {}
};

__device__ __forceinline__ float bias_of(const GateProductArgs& args, int expert) {
  return args.bias == nullptr ? 0.0F : read(args.bias_dtype, args.bias, expert);
}

// The sum of one part of H: of the only one, the logit.
__device__ __forceinline__ void store(const GateProductArgs& args, std::int64_t token, int expert, float sum) {
  if (token >= args.num_tokens || expert >= args.num_experts) return;
  const std::int64_t at = token * args.num_experts + expert;
  if (gridDim.z == 1) {
    args.logits[at] = sum + bias_of(args, expert);
  } else {
    args.parts[static_cast<std::int64_t>(blockIdx.z) * args.num_tokens * args.num_experts + at] = sum;
  }
}

__global__ void add_parts(const __grid_constant__ GateProductArgs args, int parts) {
  const std::int64_t count = args.num_tokens * args.num_experts;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  float sum = 0.0F;
  for (int part = 0; part < parts; ++part) sum = sum + args.parts[part * count + at];
  args.logits[at] = sum + bias_of(args, static_cast<int>(at % args.num_experts));
}

constexpr int kTensorThreads = 128;  // four warps, a quarter of the tile each
constexpr int kFragment = 16;
constexpr int kPerChunk = 8;       // elements of a copy
constexpr int kPitch = kStep + 8;  // of a row in shared memory: rows begin in different banks
constexpr int kSumPitch = kTile + 4;

template <class Element>
struct alignas(128) TensorMemory {
  union {
    Element tiles[2][2][kTile][kPitch];  // two steps, of x and of w
    float sums[kTile][kSumPitch];
  };
};

// Rows [0, rows) of a tile, elements [k, k + kStep) of them up to `last`; zeros elsewhere.
template <class Element>
__device__ __forceinline__ void copy_tile(Element (*to)[kPitch], const Element* from, std::int64_t stride, std::int64_t rows, int k,
                                          int last) {
  constexpr int kChunks = kStep / kPerChunk;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kChunks; i += kTensorThreads) {
    const int row = i / kChunks, at = i % kChunks * kPerChunk;
    const bool is_inside = row < rows && k + at < last;
    const Element* source = is_inside ? from + row * stride + k + at : from;
    __pipeline_memcpy_async(&to[row][at], source, sizeof(int4), is_inside ? 0 : sizeof(int4));
  }
}

template <class Element>
__global__ void __launch_bounds__(kTensorThreads) tensor_product(const __grid_constant__ GateProductArgs args, int part_size) {
  namespace wmma = nvcuda::wmma;
  __shared__ TensorMemory<Element> memory;
  const Tile tile(args, part_size);
  const auto* x = reinterpret_cast<const Element*>(args.x) + tile.token * args.x_stride;
  const auto* w = reinterpret_cast<const Element*>(args.w) + static_cast<std::int64_t>(tile.expert) * args.hidden_size;
  const auto fill = [&](int buffer, int k) {
    copy_tile(memory.tiles[buffer][0], x, args.x_stride, args.num_tokens - tile.token, k, tile.last);
    copy_tile(memory.tiles[buffer][1], w, args.hidden_size, args.num_experts - tile.expert, k, tile.last);
    __pipeline_commit();
  };
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads, half = kTile / 2;
  const int row = warp / 2 * half, column = warp % 2 * half;
  wmma::fragment<wmma::accumulator, kFragment, kFragment, kFragment, float> sums[2][2];
  for (auto& line : sums) {
    for (auto& sum : line) wmma::fill_fragment(sum, 0.0F);
  }
  fill(0, tile.first);
  for (int k = tile.first, buffer = 0; k < tile.last; k += kStep, buffer ^= 1) {
    const bool is_more = k + kStep < tile.last;
    if (is_more) fill(buffer ^ 1, k + kStep);
    __pipeline_wait_prior(is_more ? 1 : 0);
    __syncthreads();
#pragma unroll
    for (int at = 0; at < kStep; at += kFragment) {
      wmma::fragment<wmma::matrix_a, kFragment, kFragment, kFragment, Element, wmma::row_major> a[2];
      wmma::fragment<wmma::matrix_b, kFragment, kFragment, kFragment, Element, wmma::col_major> b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        wmma::load_matrix_sync(a[i], &memory.tiles[buffer][0][row + i * kFragment][at], kPitch);
        wmma::load_matrix_sync(b[i], &memory.tiles[buffer][1][column + i * kFragment][at], kPitch);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) wmma::mma_sync(sums[i / 2][i % 2], a[i / 2], b[i % 2], sums[i / 2][i % 2]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float* to = &memory.sums[row + i / 2 * kFragment][column + i % 2 * kFragment];
    wmma::store_matrix_sync(to, sums[i / 2][i % 2], kSumPitch, wmma::mem_row_major);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += kTensorThreads)
    store(args, tile.token + i / kTile, tile.expert + i % kTile, memory.sums[i / kTile][i % kTile]);
}

constexpr int kPlainThreads = 256;  // each has 4 x 4 sums
constexpr int kEach = 4;

__global__ void __launch_bounds__(kPlainThreads) plain_product(const __grid_constant__ GateProductArgs args, int part_size) {
  __shared__ float x[kPlainStep][kTile + 1], w[kPlainStep][kTile + 1];
  const Tile tile(args, part_size);
  const int lane = static_cast<int>(threadIdx.x) % (kTile / kEach), line = static_cast<int>(threadIdx.x) / (kTile / kEach);
  float sums[kEach][kEach] = {};
  for (int k = tile.first; k < tile.last; k += kPlainStep) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kPlainStep; i += kPlainThreads) {
      const int row = i / kPlainStep, at = i % kPlainStep;
      const std::int64_t token = tile.token + row, expert = tile.expert + row;
      const bool is_inside = k + at < tile.last;
      x[at][row] = is_inside && token < args.num_tokens ? read(args.x_dtype, args.x, token * args.x_stride + k + at) : 0.0F;
      w[at][row] = is_inside && expert < args.num_experts ? read(args.w_dtype, args.w, expert * args.hidden_size + k + at) : 0.0F;
    }
    __syncthreads();
#pragma unroll
    for (int at = 0; at < kPlainStep; ++at) {
#pragma unroll
      for (int i = 0; i < kEach * kEach; ++i) {
        float& sum = sums[i / kEach][i % kEach];
        sum = __fmaf_rn(x[at][line * kEach + i / kEach], w[at][lane * kEach + i % kEach], sum);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kEach * kEach; ++i)
    store(args, tile.token + line * kEach + i / kEach, tile.expert + lane * kEach + i % kEach, sums[i / kEach][i % kEach]);
}

const cuda::Preloaded preloaded({{add_parts}, {tensor_product<__nv_bfloat16>}, {tensor_product<__half>}, {plain_product}});

// 16 bytes at a time.
bool fits_tensor_cores(const GateProductArgs& args) {
  const auto addresses = reinterpret_cast<std::uintptr_t>(args.x) | reinterpret_cast<std::uintptr_t>(args.w);
  return args.x_dtype != Dtype::float32 && args.x_dtype == args.w_dtype && addresses % sizeof(int4) == 0 &&
         (args.x_stride | args.hidden_size) % kPerChunk == 0;
}

}  // namespace

std::int64_t gate_parts_bytes(int multiprocessors) {
  return std::int64_t{kBlocksPerSm} * multiprocessors * kTile * kTile * static_cast<std::int64_t>(sizeof(float));
}

void gate_product(const GateProductArgs& args, int multiprocessors, Stream stream) {
  if (args.num_tokens == 0) return;
  const bool is_tensor = fits_tensor_cores(args);
  const int step = is_tensor ? kStep : kPlainStep, steps = (args.hidden_size + step - 1) / step;
  const auto tiles = [](std::int64_t rows) { return static_cast<unsigned>((rows + kTile - 1) / kTile); };
  const std::int64_t blocks = std::int64_t{tiles(args.num_tokens)} * tiles(args.num_experts);
  const int most = static_cast<int>(std::clamp<std::int64_t>(kBlocksPerSm * multiprocessors / blocks, 1, steps));
  const int part_size = (steps + most - 1) / most * step;
  const int parts = (args.hidden_size + part_size - 1) / part_size;
  const dim3 grid(tiles(args.num_tokens), tiles(args.num_experts), static_cast<unsigned>(parts));
  if (!is_tensor) {
    plain_product<<<grid, kPlainThreads, 0, stream>>>(args, part_size);
  } else if (args.x_dtype == Dtype::bfloat16) {
    tensor_product<__nv_bfloat16><<<grid, kTensorThreads, 0, stream>>>(args, part_size);
  } else {
    tensor_product<__half><<<grid, kTensorThreads, 0, stream>>>(args, part_size);
  }
  if (parts == 1) return;
  const std::int64_t count = args.num_tokens * args.num_experts;
  add_parts<<<static_cast<unsigned>((count + kPlainThreads - 1) / kPlainThreads), kPlainThreads, 0, stream>>>(args, parts);
}

}  // namespace tokenyard::layer_cuda
