// What products of float8 weights read: rows and activations as float8, with a scale for 128 elements. A warp takes a place.

#include <cuda_runtime.h>

#include "core/preload.h"
#include "experts/cuda/elements.cuh"
#include "experts/cuda/gated.cuh"
#include "experts/cuda/kernels.h"
#include "protocol/block_scale.h"

namespace tokenyard::experts_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;  // what registers leave room for
constexpr int kAtOnce = 4;       // blocks of 128, whose loads are under way together
constexpr int kPerLane = kQuantiseBlock / kWarp;

struct Four {
  float at[kPerLane];
};
template <Dtype kDtype>
__device__ __forceinline__ Four unpacked(uint2 words) {
  Four x;
  Format<kDtype>::unpack(words.x, x.at);
  Format<kDtype>::unpack(words.y, x.at + 2);
  return x;
}

// Elements [first, first + 4) of a row of 16-bit elements, as they lie. kWhole: every row is aligned, so that no load waits for a decision.
template <bool kWhole>
__device__ __forceinline__ uint2 load_four(const std::byte* row, int first) {
  const auto* from = reinterpret_cast<const std::uint16_t*>(row) + first;
  if (kWhole || cuda::is_aligned(from, sizeof(uint2))) return *reinterpret_cast<const uint2*>(from);
  return {from[0] | static_cast<unsigned>(from[1]) << 16, from[2] | static_cast<unsigned>(from[3]) << 16};
}

// Of the block'th 128 elements, where this lane's begin.
__device__ __forceinline__ int first_of(int block) { return block * kQuantiseBlock + lane_index() * kPerLane; }

// x: this lane's part of the block; zeros behind the end of the row. Bits as quantise() gives them.
__device__ __forceinline__ void store_block(const QuantisedRows& to, std::int64_t place, int block, const Four& x) {
  std::uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) largest = max(largest, protocol::amax_bits(x.at[i]));
  largest = __reduce_max_sync(kAllLanes, largest);
  const protocol::BlockScale scale = protocol::block_scale(largest, ScaleFormat::float32);
  std::uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) packed |= protocol::e4m3_bits(x.at[i] * scale.factor) << (8 * i);
  const int first = first_of(block);
  if (first < to.columns) *reinterpret_cast<std::uint32_t*>(to.values + place * to.columns + first) = packed;
  if (lane_index() == 0) reinterpret_cast<std::uint32_t*>(to.scales)[place * to.blocks() + block] = scale.stored;
}

template <Dtype kDtype, bool kWhole>
__global__ void __launch_bounds__(kThreads) quantise_kernel(const __grid_constant__ QuantiseArgs args) {
  const int columns = static_cast<int>(args.to.columns), blocks = static_cast<int>(args.to.blocks());
  for_each_place(args.groups, [&](std::int64_t place) {
    const std::int64_t row = args.rows == nullptr ? place : args.rows[place];
    const int there = row >= 0 && row < args.num_rows ? columns : 0;
    const std::byte* from = args.from + row * args.from_stride * Format<kDtype>::kSize;
    for (int block = 0; block < blocks; block += kAtOnce) {
      uint2 x[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first_of(block + i) < there) x[i] = load_four<kWhole>(from, first_of(block + i));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (block + i < blocks) store_block(args.to, place, block + i, unpacked<kDtype>(x[i]));
      }
    }
  });
}

template <Dtype kDtype, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(const __grid_constant__ ActivationArgs args, const __grid_constant__ QuantisedRows to) {
  const Gated gated = {args.activation};
  const int blocks = static_cast<int>(to.blocks());
  const std::int64_t row_bytes = static_cast<std::int64_t>(args.width) * Format<kDtype>::kSize;
  for_each_place(args.groups, [&](std::int64_t place) {
    const std::byte* gate_row = args.gate_up + 2 * place * row_bytes;
    for (int block = 0; block < blocks; block += kAtOnce) {
      uint2 gate[kAtOnce], up[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (block + i >= blocks) continue;
        gate[i] = load_four<kWhole>(gate_row, first_of(block + i));
        up[i] = load_four<kWhole>(gate_row + row_bytes, first_of(block + i));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (block + i >= blocks) continue;
        const Four g = unpacked<kDtype>(gate[i]);
        Four x = unpacked<kDtype>(up[i]);
#pragma unroll
        for (int e = 0; e < kPerLane; ++e) x.at[e] = gated.value(g.at[e], x.at[e]);
        store_block(to, place, block + i, x);
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
  visit_rows(dtype, [&](auto of) {
    if constexpr (of.value != Dtype::float32) {
      if (whole) {
        fn(of, std::true_type());
      } else {
        fn(of, std::false_type());
      }
    }
  });
}

}  // namespace

void quantise(const QuantiseArgs& args, int num_sms, Stream stream) {
  const bool whole = are_whole(sizeof(uint2), args.dtype, args.from_stride, args.from);
  visit_halves(args.dtype, whole, [&](auto dtype, auto is_whole) {
    quantise_kernel<dtype.value, is_whole.value><<<num_sms * kBlocksPerSm, kThreads, 0, stream>>>(args);
  });
}

void activate_quantised(const ActivationArgs& args, const QuantisedRows& to, int num_sms, Stream stream) {
  const bool whole = are_whole(sizeof(uint2), args.dtype, args.width, args.gate_up);
  visit_halves(args.dtype, whole, [&](auto dtype, auto is_whole) {
    activate_kernel<dtype.value, is_whole.value><<<num_sms * kBlocksPerSm, kThreads, 0, stream>>>(args, to);
  });
}

}  // namespace tokenyard::experts_cuda
