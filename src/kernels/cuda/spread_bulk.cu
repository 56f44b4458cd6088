// Spreads rows by bulk copies, a warp a row: into shared memory and from there to each of its places, two rows under way per warp.

#include <cuda_runtime_api.h>

#include <algorithm>

#include "core/preload.h"
#include "kernels/cuda/bulk.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/spread_parts.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kStages = 2;  // of one row each

// By lane 0.
__device__ void prefetch(const SpreadArgs& args, std::int64_t i, std::byte* stage, bulk::Barrier& barrier) {
  const auto bytes = static_cast<std::uint32_t>(args.row_bytes);
  barrier.expect(bytes);
  bulk::load(stage, receive_rows(args.context, args.context.rank, args.buffer) + i * args.row_bytes, bytes, barrier);
}

// One row to all its places, and its scales.
__device__ void store_row(const SpreadJob& job, std::int64_t i, const std::byte* row) {
  const SpreadArgs& args = job.args;
  for (int k = 0; k < targets_per_row(args); k += kLanes) {
    const std::int32_t target = target_of(args, i, k + lane_index());
    for (unsigned left = __ballot_sync(kAllLanes, target >= 0); left != 0; left &= left - 1) {
      std::byte* to = args.rows + __shfl_sync(kAllLanes, target, __ffs(left) - 1) * args.row_bytes;
      if (lane_index() == 0) bulk::store(to, row, static_cast<std::uint32_t>(args.row_bytes));
    }
    spread_scales(job, i, target);
  }
  if (lane_index() == 0) bulk::commit();
}

__global__ void __launch_bounds__(kMaxWarps* kLanes, 1) spread_rows_bulk(const __grid_constant__ SpreadJob job) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ bulk::Barrier barriers[kMaxWarps][kStages];
  const SpreadArgs& args = job.args;
  if (block_has_failed(args.context)) return;
  std::byte* const stages = shared + warp_index() * kStages * args.row_bytes;
  bulk::Barrier* const mine = barriers[warp_index()];
  const SpreadRows rows(args);
  const std::int64_t step = grid_warps();
  std::int64_t i = grid_warp();
  if (lane_index() == 0) {
    for (int stage = 0; stage < kStages; ++stage) mine[stage].init(1);
    bulk::publish_barriers();
    if (i < rows.count) prefetch(args, rows.at(i), stages, mine[0]);
  }
  __syncwarp();
  int stage = 0;
  for (std::uint32_t parity = 0; i < rows.count; i += step) {
    if (lane_index() == 0 && i + step < rows.count) {
      bulk::wait_read<0>();  // the stores of the row before have read the other stage
      prefetch(args, rows.at(i + step), stages + (stage ^ 1) * args.row_bytes, mine[stage ^ 1]);
    }
    mine[stage].wait(parity);
    store_row(job, rows.at(i), stages + stage * args.row_bytes);
    __syncwarp();
    stage ^= 1;
    if (stage == 0) parity ^= 1;
  }
  if (lane_index() == 0) bulk::drain();
  spread_own_scales(job, rows);
  zero_padding(job);
}

const Preloaded preloaded({{spread_rows_bulk, kAllSharedMemory}});

}  // namespace

bool launch_spread_bulk(const SpreadJob& job, Stream stream) {
  const std::int64_t bytes = kStages * job.args.row_bytes;
  const std::int64_t warps = std::min<std::int64_t>(kMaxWarps, most_shared_bytes() / bytes);
  if (warps < 1) return false;
  const Launch launch(job.args.blocks, static_cast<int>(warps) * kLanes, static_cast<std::size_t>(warps * bytes), stream, Resident::any);
  launch(spread_rows_bulk, job);
  return true;
}

}  // namespace tokenyard::cuda
