// The first kernel of a combine with weights at their source: they go to where the rows went.

#include "kernels/cuda/combine_parts.cuh"

namespace tokenyard::cuda {
namespace {

// A warp takes a token at a time.
__device__ void send_weights(const CombineArgs& args) {
  const Context& c = args.context;
  const int top_k = args.handle.top_k;
  const Matrix& weights = args.source_weights;
  const std::int64_t tokens = args.handle.header->num_tokens;
  for (std::int64_t token = grid_warp(); token < tokens; token += grid_warps()) {
    for (int n = lane_index(); n < c.ranks * top_k; n += kLanes) {
      const int step = n / top_k;
      const int k = n - step * top_k;
      const int rank = (c.rank + step) % c.ranks;
      const std::int64_t slot = args.handle.slots[token * c.ranks + rank];
      if (slot < 0) continue;
      const std::byte* const from = weights.data + token * weights.row_stride + k * weights.column_stride;
      weights_in(c, rank)[slot * c.shape.top_k + k] = *reinterpret_cast<const float*>(from);
    }
  }
}

__global__ void __launch_bounds__(kCombineThreads, 1) send_weights_kernel(const __grid_constant__ CombineArgs args) {
  if (!begin_combine(args).failed) send_weights(args);
  if (is_last_block(args.context, kCombineEnd) && !block_has_failed(args.context)) set_flag_everywhere(args.context, Flag::weights);
}

const Preloaded preloaded({{send_weights_kernel}});

}  // namespace

void launch_combine_weights(const CombineArgs& args, Stream stream) {
  const CombineLaunch launch(args, stream, Resident::any);
  launch(send_weights_kernel, args);
}

}  // namespace tokenyard::cuda
