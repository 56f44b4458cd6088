// Copies rows and scales from where they landed to their places in the output. Purely local.

#include "core/preload.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/spread_parts.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kSpreadThreads = 512;

// A warp takes whole rows; in latency mode, where there are few, a piece of one.
__global__ void __launch_bounds__(kSpreadThreads, 1) spread_rows(const __grid_constant__ SpreadJob job) {
  const SpreadArgs& args = job.args;
  const Context& c = args.context;
  if (block_has_failed(c)) return;
  const bool latency = args.mode == Mode::latency;
  const SpreadRows placed(args);
  const std::int64_t rows = latency ? received_capacity(c, args.mode) : placed.count;
  const int pieces = spread_pieces(args);
  const int parts = latency ? pieces : 1;
  for (std::int64_t share = grid_warp(); share < rows * parts; share += grid_warps()) {
    const std::int64_t i = placed.at(share / parts);
    const int first = static_cast<int>(share % parts);
    for (int k = 0; k < targets_per_row(args); k += kLanes) {
      const std::int32_t target = target_of(args, i, k + lane_index());
      for (int piece = first; piece < pieces; piece += parts) spread_piece(job, i, piece, target);
    }
  }
  spread_own_scales(job, placed);
  zero_padding(job);
}

const Preloaded preloaded({{spread_rows}});

}  // namespace

void launch_spread(const SpreadArgs& args, Stream stream) {
  const SpreadJob job = spread_job(args);
  if (args.mode == Mode::throughput && job.row_width == 16 && has_bulk_copies() && launch_spread_bulk(job, stream)) return;
  spread_rows<<<args.blocks, kSpreadThreads, 0, stream>>>(job);
}

}  // namespace tokenyard::cuda
