#pragma once
// Rows and scales as they lie in the caller's memory: any alignment, any strides.

#include <cuda_fp16.h>

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/move_job.h"
#include "protocol/block_scale.h"

namespace tokenyard::cuda {

// kBytes from an address that is a multiple of `width`.
template <int kBytes>
__device__ inline void load_words(std::uint32_t (&to)[kBytes / 4], const std::byte* from, int width) {
  static_assert(kBytes == 8 || kBytes == 16);
  if (kBytes == 16 && width >= 16) {
    const int4 v = ptx::load_streaming(from);
    to[0] = v.x, to[1] = v.y, to[kBytes / 4 - 2] = v.z, to[kBytes / 4 - 1] = v.w;
    return;
  }
  if (width >= 8) {
#pragma unroll
    for (int i = 0; i < kBytes / 8; ++i) {
      const uint2 v = reinterpret_cast<const uint2*>(from)[i];
      to[2 * i] = v.x, to[2 * i + 1] = v.y;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kBytes / 4; ++i) {
    if (width == 4) {
      to[i] = reinterpret_cast<const std::uint32_t*>(from)[i];
    } else if (width == 2) {
      const auto* halves = reinterpret_cast<const std::uint16_t*>(from) + 2 * i;
      to[i] = halves[0] | static_cast<std::uint32_t>(halves[1]) << 16;
    } else {
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(from) + 4 * i;
      to[i] = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<std::uint32_t>(bytes[3]) << 24;
    }
  }
}

__device__ __noinline__ inline int4 load_unaligned(const std::byte* from, int width) {
  std::uint32_t words[4];
  load_words<16>(words, from, width);
  return make_int4(words[0], words[1], words[2], words[3]);
}
__device__ inline int4 load_16(const std::byte* from, int width) {
  return width == 16 ? ptx::load_streaming(from) : load_unaligned(from, width);
}

// One access of `width` bytes, 1 to 16; what is narrower lies in x.
__device__ inline int4 load_unit(const std::byte* from, int width) {
  int4 unit = {};
  if (width == 16) {
    unit = *reinterpret_cast<const int4*>(from);
  } else if (width == 8) {
    const int2 v = *reinterpret_cast<const int2*>(from);
    unit.x = v.x, unit.y = v.y;
  } else if (width == 4) {
    unit.x = *reinterpret_cast<const std::int32_t*>(from);
  } else if (width == 2) {
    unit.x = *reinterpret_cast<const std::uint16_t*>(from);
  } else {
    unit.x = *reinterpret_cast<const std::uint8_t*>(from);
  }
  return unit;
}
__device__ inline void store_unit(std::byte* to, int4 unit, int width) {
  if (width == 16) {
    *reinterpret_cast<int4*>(to) = unit;
  } else if (width == 8) {
    *reinterpret_cast<int2*>(to) = make_int2(unit.x, unit.y);
  } else if (width == 4) {
    *reinterpret_cast<std::int32_t*>(to) = unit.x;
  } else if (width == 2) {
    *reinterpret_cast<std::uint16_t*>(to) = static_cast<std::uint16_t>(unit.x);
  } else {
    *reinterpret_cast<std::uint8_t*>(to) = static_cast<std::uint8_t>(unit.x);
  }
}

__device__ inline const std::byte* row_at(const SourceArgs& source, std::int32_t token) { return source.rows + token * source.row_stride; }

// Unit `unit` of a token's scales; at the destination it lies `unit` times its width behind the row's first.
__device__ inline int4 load_scale_unit(const MoveJob& job, std::int32_t token, int unit) {
  const Matrix& scales = job.args.source.scales;
  const int column = unit / job.scales.units_per_column;
  const int within = unit - column * job.scales.units_per_column;
  const std::byte* from = scales.data + token * scales.row_stride + column * scales.column_stride + within * job.scales.width;
  return load_unit(from, job.scales.width);
}

// Four elements of a row as float32.
__device__ inline float4 load_elements(const std::byte* row, std::int32_t element, Dtype dtype, int width) {
  if (dtype == Dtype::float32) {
    std::uint32_t words[4];
    load_words<16>(words, row + std::int64_t{element} * 4, width);
    return make_float4(__uint_as_float(words[0]), __uint_as_float(words[1]), __uint_as_float(words[2]), __uint_as_float(words[3]));
  }
  std::uint32_t words[2];
  load_words<8>(words, row + std::int64_t{element} * 2, width);
  if (dtype == Dtype::bfloat16) {
    return make_float4(__uint_as_float(words[0] << 16), __uint_as_float(words[0] & 0xffff0000U), __uint_as_float(words[1] << 16),
                       __uint_as_float(words[1] & 0xffff0000U));
  }
  auto half = [](std::uint32_t bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); };
  return make_float4(half(words[0] & 0xffff), half(words[0] >> 16), half(words[1] & 0xffff), half(words[1] >> 16));
}

// Where quantised rows are staged: elements, and scales as they travel (4 bytes per block, or 1 with ue8m0).
struct QuantisedStage {
  std::byte* elements = nullptr;
  std::byte* scales = nullptr;
};

constexpr int kElementsPerLane = kQuantiseBlock / kLanes;

// Bytes of the scales of `blocks` blocks that begin at a multiple of four.
__host__ __device__ inline int quantised_scale_bytes(ScaleFormat format, int blocks) {
  return format == ScaleFormat::ue8m0 ? (blocks + 3) / 4 * 4 : blocks * 4;
}

// Block `block` of the row, into the stage at block `at`. By one warp; bits as cpu::quantise_row.
__device__ inline void quantise_block(const SourceArgs& source, float4 x, int block, int at, const QuantisedStage& stage) {
  const int lane = lane_index();
  std::uint32_t largest =
      max(max(protocol::amax_bits(x.x), protocol::amax_bits(x.y)), max(protocol::amax_bits(x.z), protocol::amax_bits(x.w)));
  largest = __reduce_max_sync(kAllLanes, largest);
  const protocol::BlockScale scale = protocol::block_scale(largest, source.format);
  const std::uint32_t packed = protocol::e4m3_bits(x.x * scale.factor) | protocol::e4m3_bits(x.y * scale.factor) << 8 |
                               protocol::e4m3_bits(x.z * scale.factor) << 16 | protocol::e4m3_bits(x.w * scale.factor) << 24;
  const int element = block * kQuantiseBlock + lane * kElementsPerLane;
  if (element < source.hidden_size) reinterpret_cast<std::uint32_t*>(stage.elements)[at * kLanes + lane] = packed;
  if (lane != 0) return;
  if (source.format != ScaleFormat::ue8m0) {
    reinterpret_cast<std::uint32_t*>(stage.scales)[at] = scale.stored;
    return;
  }
  stage.scales[at] = static_cast<std::byte>(scale.stored);
  const int blocks = (source.hidden_size + kQuantiseBlock - 1) / kQuantiseBlock;
  if (block + 1 != blocks) return;
  for (int unused = at + 1; unused % 4 != 0; ++unused) stage.scales[unused] = std::byte{0};
}

// Which blocks of a row: `first`, first + step, ... below `end`; the stage begins with block `base`.
struct BlockRange {
  int base = 0;
  int first = 0;
  int end = 0;
  int step = 1;
};

// By one warp. The stage may be read after a barrier of those who fill it.
__device__ inline void quantise_blocks(const MoveJob& job, std::int32_t token, const BlockRange& range, const QuantisedStage& stage) {
  const SourceArgs& source = job.args.source;
  const std::byte* row = row_at(source, token);
  constexpr int kAtOnce = 4;  // loads under way
  for (int block = range.first; block < range.end; block += kAtOnce * range.step) {
    float4 x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      x[i] = {};
      const int element = (block + i * range.step) * kQuantiseBlock + lane_index() * kElementsPerLane;
      if (block + i * range.step < range.end && element < source.hidden_size)
        x[i] = load_elements(row, element, source.dtype, job.row_width);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = block + i * range.step;
      if (at < range.end) quantise_block(source, x[i], at, at - range.base, stage);
    }
  }
}

}  // namespace tokenyard::cuda
