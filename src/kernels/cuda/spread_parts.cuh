#pragma once
// How one row, and its scales, get from where they landed to their places in the output. By whole warps.

#include "kernels/cuda/received.cuh"
#include "kernels/cuda/source.cuh"

namespace tokenyard::cuda {

// A spread as its kernels get it: the arguments, and how wide the accesses to memory may be that the caller has chosen.
struct SpreadJob {
  SpreadArgs args;
  int row_width = 16;    // to output rows
  int scale_width = 16;  // to scales, on either side
};

inline SpreadJob spread_job(const SpreadArgs& args) {
  SpreadJob job{.args = args, .row_width = access_width(address_bits(args.rows))};
  if (args.scale_bytes != 0) {
    job.scale_width = access_width(address_bits(args.scales) | static_cast<std::uint64_t>(args.scale_bytes));
  }
  return job;
}

// False: nothing is done, for a row does not fit into the shared memory of a block. Needs compute capability 9.0, aligned output rows.
bool launch_spread_bulk(const SpreadJob& job, Stream stream);

__device__ inline bool has_experts(const SpreadArgs& args) {
  return args.layout == Layout::expert_major || args.layout == Layout::expert_padded;
}
__device__ inline int targets_per_row(const SpreadArgs& args) { return has_experts(args) ? args.handle.top_k : 1; }

// Where (row i, k) goes, or -1; token layouts have only k = 0.
__device__ inline std::int32_t target_of(const SpreadArgs& args, std::int64_t i, int k) {
  if (k >= targets_per_row(args)) return -1;
  if (has_experts(args)) return args.handle.output_row[i * args.handle.top_k + k];
  if (args.handle.source_token[i] < 0) return -1;
  if (args.layout == Layout::token_major && args.mode == Mode::latency) return args.handle.output_row[i];
  return static_cast<std::int32_t>(i);
}

// The received rows that are to be copied: all but this rank's own where those are in their places.
struct SpreadRows {
  std::int64_t count = 0;
  std::int64_t own_begin = 0;
  std::int64_t own_count = 0;

  __device__ explicit SpreadRows(const SpreadArgs& args) : count(args.handle.header->num_rows) {
    if (!args.own_placed) return;
    const std::int32_t* begin = args.handle.source_begin + args.context.rank;
    own_begin = begin[0];
    own_count = begin[1] - begin[0];
    count -= own_count;
  }
  __device__ std::int64_t at(std::int64_t i) const { return i < own_begin ? i : i + own_count; }
};

constexpr int kSpreadUnroll = 7;  // loads under way in each lane
constexpr int kSpreadBytes = kSpreadUnroll * kLanes * 16;
__device__ inline int spread_pieces(const SpreadArgs& args) { return static_cast<int>((args.row_bytes + kSpreadBytes - 1) / kSpreadBytes); }

__device__ __noinline__ inline void store_unaligned(std::byte* to, int4 v, int width) {
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
__device__ inline void store_16(std::byte* to, int4 v, int width) {
  if (width == 16) {
    ptx::store_streaming(to, v);
  } else {
    store_unaligned(to, v, width);
  }
}

// The scales of row i to the targets of all lanes of this warp, -1 for none.
__device__ inline void spread_scales(const SpreadJob& job, std::int64_t i, std::int32_t target) {
  const SpreadArgs& args = job.args;
  const std::byte* scales = receive_scales(args.context, args.context.rank, args.buffer) + i * args.scale_bytes;
  const unsigned targets = __ballot_sync(kAllLanes, target >= 0);
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

// One piece of row i, alike. It is read once. Scales go with the first piece.
__device__ inline void spread_piece(const SpreadJob& job, std::int64_t i, int piece, std::int32_t target) {
  const SpreadArgs& args = job.args;
  const Context& c = args.context;
  const std::int64_t begin = std::int64_t{piece} * kSpreadBytes;
  const std::byte* row = receive_rows(c, c.rank, args.buffer) + i * args.row_bytes;
  const unsigned targets = __ballot_sync(kAllLanes, target >= 0);
  if (targets == 0) return;
  int4 v[kSpreadUnroll];
#pragma unroll
  for (int j = 0; j < kSpreadUnroll; ++j) {
    const std::int64_t at = begin + (j * kLanes + lane_index()) * 16;
    v[j] = at < args.row_bytes ? ptx::load_streaming(row + at) : int4{};
  }
  for (unsigned left = targets; left != 0; left &= left - 1) {
    std::byte* to = args.rows + __shfl_sync(kAllLanes, target, __ffs(left) - 1) * args.row_bytes;
#pragma unroll
    for (int j = 0; j < kSpreadUnroll; ++j) {
      const std::int64_t at = begin + (j * kLanes + lane_index()) * 16;
      if (at < args.row_bytes) store_16(to + at, v[j], job.row_width);
    }
  }
  if (piece == 0) spread_scales(job, i, target);
}

// The scales of this rank's own rows, which came without them. By all warps of the grid.
__device__ inline void spread_own_scales(const SpreadJob& job, const SpreadRows& rows) {
  if (job.args.scale_bytes == 0) return;
  for (std::int64_t i = grid_warp(); i < rows.own_count; i += grid_warps()) {
    for (int k = 0; k < targets_per_row(job.args); k += kLanes) {
      spread_scales(job, rows.own_begin + i, target_of(job.args, rows.own_begin + i, k + lane_index()));
    }
  }
}

__device__ inline void zero_row(const SpreadJob& job, std::int64_t row) {
  const SpreadArgs& args = job.args;
  for (std::int64_t at = lane_index() * 16; at < args.row_bytes; at += kLanes * 16) {
    store_16(args.rows + row * args.row_bytes + at, int4{}, job.row_width);
  }
  for (std::int64_t at = lane_index() * job.scale_width; at < args.scale_bytes; at += kLanes * job.scale_width) {
    store_unit(args.scales + row * args.scale_bytes + at, int4{}, job.scale_width);
  }
}
// Output rows without a source, where asked. By all warps of the grid.
__device__ inline void zero_padding(const SpreadJob& job) {
  const SpreadArgs& args = job.args;
  if (!args.zero_padding || !has_experts(args)) return;
  for (std::int64_t row = grid_warp(); row < args.output_rows; row += grid_warps()) {
    if (args.handle.out_source_rank[row] < 0) zero_row(job, row);
  }
}

}  // namespace tokenyard::cuda
