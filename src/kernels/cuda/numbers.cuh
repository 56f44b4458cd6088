#pragma once
// Elements of rows, 16 bytes at a time: to float32 and back, with the rounding of src/core/dtype.cc. The conversion
// instructions make every NaN the positive one with all mantissa bits set, as the CPU does.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "tokenyard/dtype.h"

namespace tokenyard::cuda {

constexpr int kVectorBytes = 16;

// A 32-bit word of elements.
template <Dtype kDtype>
struct Format;

template <>
struct Format<Dtype::float32> {
  static constexpr int kSize = 4;
  __device__ static void unpack(unsigned word, float* to) { to[0] = __uint_as_float(word); }
  __device__ static unsigned pack(const float* from) {
    constexpr unsigned kNan = 0x7fffffff;
    return from[0] == from[0] ? __float_as_uint(from[0]) : kNan;
  }
};

template <>
struct Format<Dtype::bfloat16> {
  static constexpr int kSize = 2;
  __device__ static void unpack(unsigned word, float* to) {
    to[0] = __uint_as_float(word << 16);
    to[1] = __uint_as_float(word & 0xffff0000U);
  }
  __device__ static unsigned pack(const float* from) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
    return reinterpret_cast<const unsigned&>(pair);
  }
};

template <>
struct Format<Dtype::float16> {
  static constexpr int kSize = 2;
  __device__ static void unpack(unsigned word, float* to) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
    to[0] = pair.x;
    to[1] = pair.y;
  }
  __device__ static unsigned pack(const float* from) {
    const __half2 pair = __floats2half2_rn(from[0], from[1]);
    return reinterpret_cast<const unsigned&>(pair);
  }
};

template <Dtype kDtype>
constexpr int kPerWord = 4 / Format<kDtype>::kSize;
template <Dtype kDtype>
constexpr int kPerVector = kVectorBytes / Format<kDtype>::kSize;

// The elements of one vector as float32.
template <Dtype kDtype>
struct Floats {
  static constexpr int kCount = kPerVector<kDtype>;
  float at[kCount];

  __device__ __forceinline__ static Floats zero() {
    Floats x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.at[i] = 0.0F;
    return x;
  }
  __device__ __forceinline__ static Floats of(int4 vector) {
    Floats x;
    const unsigned words[4] = {static_cast<unsigned>(vector.x), static_cast<unsigned>(vector.y), static_cast<unsigned>(vector.z),
                               static_cast<unsigned>(vector.w)};
#pragma unroll
    for (int w = 0; w < 4; ++w) Format<kDtype>::unpack(words[w], x.at + w * kPerWord<kDtype>);
    return x;
  }
  // Rounded to the element type.
  __device__ __forceinline__ int4 packed() const {
    unsigned words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] = Format<kDtype>::pack(at + w * kPerWord<kDtype>);
    return make_int4(static_cast<int>(words[0]), static_cast<int>(words[1]), static_cast<int>(words[2]), static_cast<int>(words[3]));
  }
  __device__ __forceinline__ void add(const Floats& x) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) at[i] = at[i] + x.at[i];
  }
  __device__ __forceinline__ void add_product(float weight, const Floats& x) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) at[i] = fmaf(weight, x.at[i], at[i]);
  }
};

__device__ __forceinline__ bool is_aligned(const void* at, unsigned bytes) { return reinterpret_cast<std::uintptr_t>(at) % bytes == 0; }

// 16 bytes of a row that is read once. kAligned: known to lie on 16 bytes; otherwise they lie on elements, of 2 bytes at least.
template <bool kAligned>
__device__ __forceinline__ int4 load_vector(const std::byte* from) {
  if (kAligned || is_aligned(from, kVectorBytes)) return ptx::load_streaming(from);
  const auto* halves = reinterpret_cast<const std::uint16_t*>(from);
  int words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = static_cast<int>(halves[2 * w] | static_cast<unsigned>(halves[2 * w + 1]) << 16);
  return make_int4(words[0], words[1], words[2], words[3]);
}

template <int kWords>
__device__ __forceinline__ void store_words(std::byte* to, const unsigned (&words)[kWords]) {
  if (kWords % 4 == 0 && is_aligned(to, 16)) {
#pragma unroll
    for (int w = 0; w + 3 < kWords; w += 4) {
      reinterpret_cast<uint4*>(to)[w / 4] = make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
    }
  } else if (kWords % 2 == 0 && is_aligned(to, 8)) {
#pragma unroll
    for (int w = 0; w + 1 < kWords; w += 2) reinterpret_cast<uint2*>(to)[w / 2] = make_uint2(words[w], words[w + 1]);
  } else {
    auto* halves = reinterpret_cast<std::uint16_t*>(to);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      halves[2 * w] = static_cast<std::uint16_t>(words[w]);
      halves[2 * w + 1] = static_cast<std::uint16_t>(words[w] >> 16);
    }
  }
}

template <Dtype kOut, int kCount>
__device__ __forceinline__ void store_as(std::byte* row, int vector, const float (&sums)[kCount]) {
  constexpr int kBytes = kCount * Format<kOut>::kSize;
  unsigned words[kBytes / 4];
#pragma unroll
  for (int w = 0; w < kBytes / 4; ++w) words[w] = Format<kOut>::pack(sums + w * kPerWord<kOut>);
  store_words(row + static_cast<std::int64_t>(vector) * kBytes, words);
}

// The kCount sums of the vector-th vector of a row, rounded once to the dtype of the output.
template <int kCount>
__device__ __forceinline__ void store_sums(std::byte* row, int vector, const float (&sums)[kCount], Dtype dtype) {
  if (dtype == Dtype::bfloat16) {
    store_as<Dtype::bfloat16>(row, vector, sums);
  } else if (dtype == Dtype::float16) {
    store_as<Dtype::float16>(row, vector, sums);
  } else {
    store_as<Dtype::float32>(row, vector, sums);
  }
}

}  // namespace tokenyard::cuda
