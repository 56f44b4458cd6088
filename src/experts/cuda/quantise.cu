// What products of float8 weights read: rows and activations as float8, with a scale for 128 elements. A warp takes 128 of a place.

#include <cuda_runtime.h>

#include "core/preload.h"
#include "experts/cuda/elements.cuh"
#include "experts/cuda/gated.cuh"
#include "experts/cuda/kernels.h"
#include "protocol/block_scale.h"

namespace tokenyard::experts_cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kBlocksPerSm = 8;
constexpr unsigned kAllLanes = 0xffffffffU;
constexpr int kPerLane = kQuantiseBlock / kWarp;

struct Four {
  float at[kPerLane];
};

// Elements [first, first + 4) of a row of 16-bit elements.
template <Dtype kDtype>
__device__ __forceinline__ Four load_four(const std::byte* row, std::int64_t first) {
  Four x;
  const std::byte* from = row + first * Format<kDtype>::kSize;
  if (cuda::is_aligned(from, sizeof(uint2))) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    Format<kDtype>::unpack(words.x, x.at);
    Format<kDtype>::unpack(words.y, x.at + 2);
    return x;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x.at[i] = load_element<kDtype>(row, first + i);
  return x;
}

// Calls fn(place, block) for every 128 elements of all groups' places, each by one warp.
template <class Fn>
__device__ __forceinline__ void for_each_block(const Groups& groups, std::int64_t blocks, Fn&& fn) {
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * kWarps;
  std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp, first = 0;
  for (int g = 0; g < groups.num_groups; ++g) {
    const Span span = span_of(groups, g);
    for (; at < first + span.count * blocks; at += warps) fn(span.begin + (at - first) / blocks, (at - first) % blocks);
    first += span.count * blocks;
  }
}

// x: this lane's part of the block; zeros behind the end of the row. Bits as quantise() gives them.
__device__ __forceinline__ void store_block(const QuantisedRows& to, std::int64_t place, std::int64_t block, const Four& x) {
  std::uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) largest = max(largest, protocol::amax_bits(x.at[i]));
  largest = __reduce_max_sync(kAllLanes, largest);
  const protocol::BlockScale scale = protocol::block_scale(largest, ScaleFormat::float32);
  std::uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) packed |= protocol::e4m3_bits(x.at[i] * scale.factor) << (8 * i);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t first = block * kQuantiseBlock + lane * kPerLane;
  if (first < to.columns) *reinterpret_cast<std::uint32_t*>(to.values + place * to.columns + first) = packed;
  if (lane == 0) reinterpret_cast<std::uint32_t*>(to.scales)[place * to.blocks() + block] = scale.stored;
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kWarp* kWarps) quantise_kernel(const __grid_constant__ QuantiseArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for_each_block(args.groups, args.to.blocks(), [&](std::int64_t place, std::int64_t block) {
    const std::int64_t row = args.rows == nullptr ? place : args.rows[place];
    const std::int64_t first = block * kQuantiseBlock + lane * kPerLane;
    Four x = {};
    if (row >= 0 && row < args.num_rows && first < args.to.columns) {
      x = load_four<kDtype>(args.from + row * args.from_stride * Format<kDtype>::kSize, first);
    }
    store_block(args.to, place, block, x);
  });
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kWarp* kWarps)
    activate_kernel(const __grid_constant__ ActivationArgs args, const __grid_constant__ QuantisedRows to) {
  const Gated gated = {args.activation};
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t row_bytes = static_cast<std::int64_t>(args.width) * Format<kDtype>::kSize;
  for_each_block(args.groups, to.blocks(), [&](std::int64_t place, std::int64_t block) {
    const std::byte* gate_row = args.gate_up + 2 * place * row_bytes;
    const std::int64_t first = block * kQuantiseBlock + lane * kPerLane;
    const Four gate = load_four<kDtype>(gate_row, first);
    Four x = load_four<kDtype>(gate_row + row_bytes, first);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x.at[i] = gated.value(gate.at[i], x.at[i]);
    store_block(to, place, block, x);
  });
}

const cuda::Preloaded preloaded({{quantise_kernel<Dtype::bfloat16>},
                                 {quantise_kernel<Dtype::float16>},
                                 {activate_kernel<Dtype::bfloat16>},
                                 {activate_kernel<Dtype::float16>}});

// Calls the launcher for one of the two types that rows of float8 products come from.
template <class Fn>
void visit_halves(Dtype dtype, Fn&& fn) {
  if (dtype == Dtype::bfloat16) fn(std::integral_constant<Dtype, Dtype::bfloat16>());
  if (dtype == Dtype::float16) fn(std::integral_constant<Dtype, Dtype::float16>());
}

}  // namespace

void quantise(const QuantiseArgs& args, int num_sms, Stream stream) {
  visit_halves(args.dtype, [&](auto dtype) { quantise_kernel<dtype.value><<<num_sms * kBlocksPerSm, kWarp * kWarps, 0, stream>>>(args); });
}

void activate_quantised(const ActivationArgs& args, const QuantisedRows& to, int num_sms, Stream stream) {
  visit_halves(args.dtype,
               [&](auto dtype) { activate_kernel<dtype.value><<<num_sms * kBlocksPerSm, kWarp * kWarps, 0, stream>>>(args, to); });
}

}  // namespace tokenyard::experts_cuda
