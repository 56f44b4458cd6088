// A combine by pull: the rows that peers made are partial sums already, and are added up straight from their memory.

#include "kernels/cuda/combine_sum.cuh"

namespace tokenyard::cuda {
namespace {

// By the last block. Peers wait for the flag before they write their expert rows again, and this rank waits for theirs (settle).
__device__ void finish_pull(const CombineArgs& args, std::uint64_t call) {
  const Context& c = args.context;
  // What has been read is in registers: nothing is left for a release to wait for. Also of a call that has failed.
  for (int peer = threadIdx.x; peer < c.ranks; peer += blockDim.x) {
    set_flag_relaxed(c, Flag::reads, peer, call);
  }
  const bool failed = block_has_failed(c);
  if (!failed && warp_index() == 0) add_link_bytes(c, args.handle.rank_counts, args.header.row_bytes);
  if (threadIdx.x == 0 && !failed) c.state->last_pull = call;
  end_call(c, failed, call);
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_pull_kernel(const __grid_constant__ CombineArgs args) {
  const CallState state = announce_combine(args);
  sum_tokens<kDtype, true, true>(args, [&] { return meet_peers(args, state); });
  if (is_last_block(args.context, kCombineEnd, false)) finish_pull(args, state.call);
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
