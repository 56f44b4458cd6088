// Copies rows and scales from where they landed to their places in the output, one warp a row. Purely local.

#include "kernels/cuda/layout_parts.cuh"
#include "kernels/cuda/preload.h"
#include "kernels/cuda/source.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kSpreadThreads = 512;
constexpr int kUnroll = 7;  // loads under way in each lane
constexpr int kPieceBytes = kUnroll * kLanes * 16;

struct SpreadJob {
  SpreadArgs args;
  int row_width = 16;    // of accesses to output rows, which may be the caller's memory
  int scale_width = 16;  // of accesses to scales, on either side
};

__device__ bool has_experts(const SpreadArgs& args) { return args.layout == Layout::expert_major || args.layout == Layout::expert_padded; }

// Where (row i, k) goes, or -1; token layouts have only k = 0.
__device__ std::int32_t target_of(const SpreadArgs& args, std::int64_t i, int k) {
  if (has_experts(args)) return args.handle.output_row[i * args.handle.top_k + k];
  if (args.handle.source_token[i] < 0) return -1;
  if (args.layout == Layout::token_major && args.mode == Mode::latency) return args.handle.output_row[i];
  return static_cast<std::int32_t>(i);
}

__device__ void store_16(std::byte* to, int4 v, int width) {
  if (width == 16) {
    ptx::store_streaming(to, v);
    return;
  }
  const std::uint32_t words[4] = {static_cast<std::uint32_t>(v.x), static_cast<std::uint32_t>(v.y), static_cast<std::uint32_t>(v.z),
                                  static_cast<std::uint32_t>(v.w)};
#pragma unroll
  for (int i = 0; i < 16; ++i) {  // unaligned memory of a caller: right, not fast
    if (width >= 4) {
      if (i < 4) reinterpret_cast<std::uint32_t*>(to)[i] = words[i % 4];
    } else {
      reinterpret_cast<std::uint8_t*>(to)[i] = static_cast<std::uint8_t>(words[i / 4] >> (i % 4 * 8));
    }
  }
}

// One row to the targets of all lanes of this warp: -1 for none. It is read once.
__device__ void spread_row(const SpreadJob& job, std::int64_t i, std::int32_t target) {
  const SpreadArgs& args = job.args;
  const Context& c = args.context;
  const std::byte* row = receive_rows(c, c.rank, args.buffer) + i * args.row_bytes;
  const unsigned targets = __ballot_sync(kAllLanes, target >= 0);
  if (targets == 0) return;
  for (std::int64_t piece = 0; piece < args.row_bytes; piece += kPieceBytes) {
    int4 v[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const std::int64_t at = piece + (j * kLanes + lane_index()) * 16;
      v[j] = at < args.row_bytes ? ptx::load_streaming(row + at) : int4{};
    }
    for (unsigned left = targets; left != 0; left &= left - 1) {
      std::byte* to = args.rows + __shfl_sync(kAllLanes, target, __ffs(left) - 1) * args.row_bytes;
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const std::int64_t at = piece + (j * kLanes + lane_index()) * 16;
        if (at < args.row_bytes) store_16(to + at, v[j], job.row_width);
      }
    }
  }
  const std::byte* scales = receive_scales(c, c.rank, args.buffer) + i * args.scale_bytes;
  for (std::int64_t begin = 0; begin < args.scale_bytes; begin += kLanes * job.scale_width) {
    const std::int64_t at = begin + lane_index() * job.scale_width;
    const bool mine = at < args.scale_bytes;
    const int4 unit = mine ? load_unit(scales + at, job.scale_width) : int4{};
    for (unsigned left = targets; left != 0; left &= left - 1) {
      std::byte* to = args.scales + __shfl_sync(kAllLanes, target, __ffs(left) - 1) * args.scale_bytes;
      if (mine) store_unit(to + at, unit, job.scale_width);
    }
  }
}

__device__ void zero_row(const SpreadJob& job, std::int64_t row) {
  const SpreadArgs& args = job.args;
  for (std::int64_t at = lane_index() * 16; at < args.row_bytes; at += kLanes * 16) {
    store_16(args.rows + row * args.row_bytes + at, int4{}, job.row_width);
  }
  for (std::int64_t at = lane_index() * job.scale_width; at < args.scale_bytes; at += kLanes * job.scale_width) {
    store_unit(args.scales + row * args.scale_bytes + at, int4{}, job.scale_width);
  }
}

__global__ void __launch_bounds__(kSpreadThreads, 1) spread_rows(const __grid_constant__ SpreadJob job) {
  const SpreadArgs& args = job.args;
  const Context& c = args.context;
  const HandleView& handle = args.handle;
  if (block_has_failed(c)) return;
  const std::int64_t first = static_cast<std::int64_t>(warp_index()) * gridDim.x + blockIdx.x;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * warps_of_block();
  const std::int64_t rows = args.mode == Mode::latency ? received_capacity(c, args.mode) : handle.header->num_rows;
  const int width = has_experts(args) ? handle.top_k : 1;
  for (std::int64_t i = first; i < rows; i += step) {
    for (int begin = 0; begin < width; begin += kLanes) {
      const int k = begin + lane_index();
      spread_row(job, i, k < width ? target_of(args, i, k) : -1);
    }
  }
  if (!args.zero_padding || !has_experts(args)) return;
  for (std::int64_t row = first; row < args.output_rows; row += step) {
    if (handle.out_source_rank[row] < 0) zero_row(job, row);
  }
}

const Preloaded preloaded({{spread_rows}});

}  // namespace

void launch_spread(const SpreadArgs& args, Stream stream) {
  SpreadJob job{.args = args, .row_width = access_width(address_bits(args.rows))};
  if (args.scale_bytes != 0) {
    job.scale_width = access_width(address_bits(args.scales) | static_cast<std::uint64_t>(args.scale_bytes));
  }
  spread_rows<<<args.blocks, kSpreadThreads, 0, stream>>>(job);
}

}  // namespace tokenyard::cuda
