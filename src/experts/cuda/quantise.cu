// What products of float8 weights read: rows and activations as float8, with a scale for 128 elements. A warp takes a place.

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "core/preload.h"
#include "experts/cuda/elements.cuh"
#include "experts/cuda/gated.cuh"
#include "experts/cuda/kernels.h"
#include "protocol/block_scale.h"

namespace tokenyard::experts_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;    // what registers leave room for
constexpr int kAtOnce = 4;         // pairs of blocks of 128, whose loads are under way together
constexpr int kHalf = kLanes / 2;  // lanes that have a block of 128 elements
constexpr int kPerLane = kQuantiseBlock / kHalf;

struct Eight {
  float at[kPerLane];
};
template <Dtype kDtype>
__device__ __forceinline__ Eight unpacked(int4 words) {
  Eight x;
  const int all[] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) Format<kDtype>::unpack(static_cast<unsigned>(all[i]), x.at + 2 * i);
  return x;
}

// Elements [first, first + 8) of a row of 16-bit elements, as they lie; zeros from `columns` on. kWhole: they are all there or none, and
// aligned, so that no load waits for a decision.
template <bool kWhole>
__device__ __forceinline__ int4 load_eight(const std::byte* row, int first, int columns) {
  const auto* from = reinterpret_cast<const std::uint16_t*>(row) + first;
  if constexpr (kWhole) {
    return first < columns ? *reinterpret_cast<const int4*>(from) : int4{};
  } else {
    int words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = first + 2 * i < columns ? from[2 * i] : 0;
      if (first + 2 * i + 1 < columns) words[i] |= from[2 * i + 1] << 16;
    }
    return {words[0], words[1], words[2], words[3]};
  }
}

// The block of this half of a warp, of two that begin with `block`; and where in its row this lane's elements begin.
__device__ __forceinline__ int block_from(int block) { return block + lane_index() / kHalf; }
__device__ __forceinline__ int first_of(int block) { return block * kQuantiseBlock + lane_index() % kHalf * kPerLane; }

// As protocol::e4m3_bits, four at a time.
__device__ __forceinline__ std::uint32_t e4m3_of_finite(const float* x) {
  const unsigned low = __nv_cvt_float2_to_fp8x2({x[0], x[1]}, __NV_SATFINITE, __NV_E4M3);
  return low | static_cast<unsigned>(__nv_cvt_float2_to_fp8x2({x[2], x[3]}, __NV_SATFINITE, __NV_E4M3)) << 16;
}
__device__ __forceinline__ std::uint32_t e4m3_of_any(const float* x) {
  std::uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed |= protocol::e4m3_bits(x[i]) << (8 * i);
  return packed;
}

// x: this lane's part of the block; zeros behind the end of the row. By a whole warp, for two blocks. Bits as quantise() gives them.
template <bool kWhole>
__device__ __forceinline__ void store_block(const QuantisedRows& to, std::int64_t place, int block, Eight x) {
  std::uint32_t largest = 0;
  bool is_finite = true;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    largest = max(largest, protocol::amax_bits(x.at[i]));
    is_finite = is_finite && isfinite(x.at[i]);
  }
#pragma unroll
  for (int distance = kHalf / 2; distance > 0; distance /= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  const protocol::BlockScale scale = protocol::block_scale(largest, ScaleFormat::float32);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x.at[i] *= scale.factor;
  const uint2 packed =
      is_finite ? make_uint2(e4m3_of_finite(x.at), e4m3_of_finite(x.at + 4)) : make_uint2(e4m3_of_any(x.at), e4m3_of_any(x.at + 4));
  const int first = first_of(block);
  auto* const values = reinterpret_cast<std::uint32_t*>(to.values + place * to.columns + first);
  if constexpr (kWhole) {
    if (first < to.columns) *reinterpret_cast<uint2*>(values) = packed;
  } else {
    if (first < to.columns) values[0] = packed.x;
    if (first + 4 < to.columns) values[1] = packed.y;
  }
  if (lane_index() % kHalf == 0 && block < to.blocks()) {
    reinterpret_cast<std::uint32_t*>(to.scales)[place * to.blocks() + block] = scale.stored;
  }
}

template <Dtype kDtype, bool kWhole>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) quantise_kernel(const __grid_constant__ QuantiseArgs args) {
  const int columns = static_cast<int>(args.to.columns), blocks = static_cast<int>(args.to.blocks());
  for_each_place(args.groups, [&](std::int64_t place) {
    const std::int64_t row = args.rows == nullptr ? place : args.rows[place];
    const int there = row >= 0 && row < args.num_rows ? columns : 0;
    const std::byte* from = args.from + row * args.from_stride * Format<kDtype>::kSize;
    for (int block = 0; block < blocks; block += 2 * kAtOnce) {
      int4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) x[i] = load_eight<kWhole>(from, first_of(block_from(block + 2 * i)), there);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (block + 2 * i < blocks) store_block<kWhole>(args.to, place, block_from(block + 2 * i), unpacked<kDtype>(x[i]));
      }
    }
  });
}

template <Dtype kDtype, bool kWhole>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    activate_kernel(const __grid_constant__ ActivationArgs args, const __grid_constant__ QuantisedRows to) {
  const Gated gated = {args.activation};
  const int blocks = static_cast<int>(to.blocks());
  const std::int64_t row_bytes = static_cast<std::int64_t>(args.width) * Format<kDtype>::kSize;
  for_each_place(args.groups, [&](std::int64_t place) {
    const std::byte* gate_row = args.gate_up + 2 * place * row_bytes;
    for (int block = 0; block < blocks; block += 2 * kAtOnce) {
      int4 gate[kAtOnce], up[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int first = first_of(block_from(block + 2 * i));
        gate[i] = load_eight<kWhole>(gate_row, first, args.width);
        up[i] = load_eight<kWhole>(gate_row + row_bytes, first, args.width);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (block + 2 * i >= blocks) continue;
        const Eight g = unpacked<kDtype>(gate[i]);
        Eight x = unpacked<kDtype>(up[i]);
#pragma unroll
        for (int e = 0; e < kPerLane; ++e) x.at[e] = gated.value(g.at[e], x.at[e]);
        store_block<kWhole>(to, place, block_from(block + 2 * i), x);
      }
    }
  });
}

const cuda::Preloaded preloaded({{quantise_kernel<Dtype::bfloat16, true>},
                                 {quantise_kernel<Dtype::bfloat16, false>},
                                 {quantise_kernel<Dtype::float16, true>},
                                 {quantise_kernel<Dtype::float16, false>},
                                 {activate_kernel<Dtype::bfloat16, true>},
                                 {activate_kernel<Dtype::bfloat16, false>},
                                 {activate_kernel<Dtype::float16, true>},
                                 {activate_kernel<Dtype::float16, false>}});

// Calls the launcher for one of the two types that rows of float8 products come from.
template <class Fn>
void visit_halves(Dtype dtype, bool whole, Fn&& fn) {
  visit_rows(dtype, whole, [&](auto of, auto is_whole) {
    if constexpr (of.value != Dtype::float32) fn(of, is_whole);
  });
}

}  // namespace

void quantise(const QuantiseArgs& args, int num_sms, Stream stream) {
  const bool whole = args.to.columns % kPerLane == 0 && are_whole(cuda::kVectorBytes, args.dtype, args.from_stride, args.from);
  visit_halves(args.dtype, whole, [&](auto dtype, auto is_whole) {
    quantise_kernel<dtype.value, is_whole.value><<<num_sms * kBlocksPerSm, kThreads, 0, stream>>>(args);
  });
}

void activate_quantised(const ActivationArgs& args, const QuantisedRows& to, int num_sms, Stream stream) {
  const bool whole = are_whole(cuda::kVectorBytes, args.dtype, args.width, args.gate_up);
  visit_halves(args.dtype, whole, [&](auto dtype, auto is_whole) {
    activate_kernel<dtype.value, is_whole.value><<<num_sms * kBlocksPerSm, kThreads, 0, stream>>>(args, to);
  });
}

}  // namespace tokenyard::experts_cuda
