// A combine by pull: the rows that peers made are partial sums already, and are added up straight from their memory.

#include "kernels/cuda/combine_sum.cuh"

namespace tokenyard::cuda {
namespace {

__device__ bool begin_pull(const CombineArgs& args) {
  const bool good = begin_combine(args);
  if (good && blockIdx.x == 0) add_link_bytes(args.context, args.handle.rank_counts, args.header.row_bytes);
  return good;
}

// By the last block. Peers wait for the flag before they write their expert rows again, and this rank waits for theirs (settle).
__device__ void finish_pull(const Context& c) {
  const std::uint64_t call = call_number(c);
  const bool failed = block_has_failed(c);
  // What has been read is in registers: nothing is left for a release to wait for.
  for (int peer = threadIdx.x; peer < c.ranks; peer += blockDim.x) {
    ptx::store_relaxed(&mailbox(c, peer, c.rank).flags[static_cast<int>(Flag::reads)], protocol::flag_word(call));
  }
  if (threadIdx.x == 0 && !failed) c.state->last_pull = call;
  __syncthreads();
  end_call(c, failed);
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_pull_kernel(const __grid_constant__ CombineArgs args) {
  sum_tokens<kDtype, true, true>(args, [&] { return begin_pull(args); });
  if (is_last_block(args.context, kCombineEnd)) finish_pull(args.context);
}

const Preloaded preloaded({{combine_pull_kernel<Dtype::float32>},
                           {combine_pull_kernel<Dtype::bfloat16>},
                           {combine_pull_kernel<Dtype::float16>}});

}  // namespace

void launch_combine_pull(const CombineArgs& args, Stream stream) {
  const CombineLaunch launch(args, stream, Resident::any);
  visit_combined(args.dtype, [&](auto dtype) { launch(combine_pull_kernel<dtype.value>, args); });
}

}  // namespace tokenyard::cuda
