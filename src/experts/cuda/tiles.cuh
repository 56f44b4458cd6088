#pragma once
// The parts of the generic grouped product: a 64 x 64 tile of the result by one block of four warps, its operands in shared memory
// as they lie in device memory, the next ones under way in registers.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#include "experts/cuda/groups.cuh"

namespace tokenyard::experts_cuda {

constexpr int kTile = 64;   // rows and columns of the result
constexpr int kDepth = 32;  // of the sum, at once
constexpr int kBlockThreads = 128;

// Where an operand lies: `inner` runs along memory. Outside its bounds it is zero, whatever memory holds.
struct Operand {
  const std::byte* data = nullptr;
  std::int64_t stride = 0;                // elements, along outer
  const std::int32_t* indices = nullptr;  // [outer]: the row to read; none: outer itself
  std::int64_t num_rows = 0;              // of indices' values
  std::int64_t outers = 0;
  std::int64_t inners = 0;
};

// A piece of an operand, [kOuter, kInner], on its way to shared memory.
template <class Element, int kOuter, int kInner>
class Piece {
 public:
  static constexpr int kVector = 8;
  static constexpr int kPerThread = kOuter * kInner / kVector / kBlockThreads;
  static constexpr int kStride = kInner + 16 / sizeof(Element);  // rows on other banks

  __device__ __forceinline__ void load(const Operand& operand, std::int64_t outer_begin, std::int64_t inner_begin) {
#pragma unroll
    for (int v = 0; v < kPerThread; ++v) {
      const int at = static_cast<int>(threadIdx.x) + v * kBlockThreads;
      load_vector(operand, outer_begin + at / (kInner / kVector), inner_begin + at % (kInner / kVector) * kVector, values_[v]);
    }
  }
  __device__ __forceinline__ void store(Element* shared) const {
#pragma unroll
    for (int v = 0; v < kPerThread; ++v) {
      const int at = static_cast<int>(threadIdx.x) + v * kBlockThreads;
      Element* to = shared + at / (kInner / kVector) * kStride + at % (kInner / kVector) * kVector;
#pragma unroll
      for (int i = 0; i < kVector; ++i) to[i] = values_[v][i];
    }
  }

 private:
  struct alignas(16) Quad {
    Element at[16 / sizeof(Element)];
  };
  __device__ __forceinline__ static void load_vector(const Operand& operand, std::int64_t outer, std::int64_t inner,
                                                     Element (&to)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = Element(0.0F);
    if (outer >= operand.outers || inner >= operand.inners) return;
    const std::int64_t row = operand.indices == nullptr ? outer : operand.indices[outer];
    if (operand.indices != nullptr && (row < 0 || row >= operand.num_rows)) return;
    const Element* from = reinterpret_cast<const Element*>(operand.data) + row * operand.stride + inner;
    constexpr int kPerQuad = 16 / sizeof(Element);
    if (inner + kVector <= operand.inners && reinterpret_cast<std::uintptr_t>(from) % 16 == 0) {
#pragma unroll
      for (int q = 0; q < kVector / kPerQuad; ++q) {
        const Quad quad = reinterpret_cast<const Quad*>(from)[q];
#pragma unroll
        for (int i = 0; i < kPerQuad; ++i) to[q * kPerQuad + i] = quad.at[i];
      }
    } else {
      for (int i = 0; i < kVector && inner + i < operand.inners; ++i) to[i] = from[i];
    }
  }

  Element values_[kPerThread][kVector];
};

// Sums of a tile. kAOuterIsM: A lies [m][depth], else [depth][m]; kBOuterIsN: B lies [n][depth], else [depth][n].
template <class Element, bool kAOuterIsM, bool kBOuterIsN>
class TileSums {
 public:
  using PieceA = Piece<Element, kAOuterIsM ? kTile : kDepth, kAOuterIsM ? kDepth : kTile>;
  using PieceB = Piece<Element, kBOuterIsN ? kTile : kDepth, kBOuterIsN ? kDepth : kTile>;

  __device__ __forceinline__ TileSums() {
#pragma unroll
    for (auto& row : parts_) {
#pragma unroll
      for (auto& part : row) nvcuda::wmma::fill_fragment(part, 0.0F);
    }
  }
  // Adds A B over kDepth.
  __device__ __forceinline__ void add(const Element* a, const Element* b) {
    using namespace nvcuda::wmma;
    const int m = warp() / 2 * 32, n = warp() % 2 * 32;
    using LayoutA = std::conditional_t<kAOuterIsM, row_major, col_major>;
    using LayoutB = std::conditional_t<kBOuterIsN, col_major, row_major>;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      fragment<matrix_a, 16, 16, 16, Element, LayoutA> of_a[2];
      fragment<matrix_b, 16, 16, 16, Element, LayoutB> of_b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrix_sync(of_a[i], a + at<kAOuterIsM, PieceA::kStride>(m + 16 * i, k), PieceA::kStride);
        load_matrix_sync(of_b[i], b + at<kBOuterIsN, PieceB::kStride>(n + 16 * i, k), PieceB::kStride);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) mma_sync(parts_[i][j], of_a[i], of_b[j], parts_[i][j]);
      }
    }
  }
  // To [kTile][kTile + 4] in shared memory.
  __device__ __forceinline__ void store(float* sums) const {
    const int m = warp() / 2 * 32, n = warp() % 2 * 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        nvcuda::wmma::store_matrix_sync(sums + (m + 16 * i) * (kTile + 4) + n + 16 * j, parts_[i][j], kTile + 4,
                                        nvcuda::wmma::mem_row_major);
      }
    }
  }

 private:
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  template <bool kOuterIsFirst, int kStride>
  __device__ __forceinline__ static int at(int mn, int k) {
    return kOuterIsFirst ? mn * kStride + k : k * kStride + mn;
  }

  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> parts_[2][2];
};

// float32: no tensor core keeps its precision. A thread has 8 rows and 4 columns.
template <bool kAOuterIsM, bool kBOuterIsN>
class TileSums<float, kAOuterIsM, kBOuterIsN> {
 public:
  using PieceA = Piece<float, kAOuterIsM ? kTile : kDepth, kAOuterIsM ? kDepth : kTile>;
  using PieceB = Piece<float, kBOuterIsN ? kTile : kDepth, kBOuterIsN ? kDepth : kTile>;

  __device__ __forceinline__ void add(const float* a, const float* b) {
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      float of_a[8], of_b[4];
#pragma unroll
      for (int i = 0; i < 8; ++i) of_a[i] = a[kAOuterIsM ? (first_m() + i) * PieceA::kStride + k : k * PieceA::kStride + first_m() + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) of_b[j] = b[kBOuterIsN ? (first_n() + j) * PieceB::kStride + k : k * PieceB::kStride + first_n() + j];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) parts_[i][j] = fmaf(of_a[i], of_b[j], parts_[i][j]);
      }
    }
  }
  __device__ __forceinline__ void store(float* sums) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[(first_m() + i) * (kTile + 4) + first_n() + j] = parts_[i][j];
    }
  }

 private:
  __device__ __forceinline__ static int first_m() { return static_cast<int>(threadIdx.x) / 16 * 8; }
  __device__ __forceinline__ static int first_n() { return static_cast<int>(threadIdx.x) % 16 * 4; }
  float parts_[8][4] = {};
};

}  // namespace tokenyard::experts_cuda
