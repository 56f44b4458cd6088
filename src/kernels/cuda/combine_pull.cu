// A combine by pull: the rows that peers made are partial sums already, and are added up straight from their memory.

#include "kernels/cuda/combine_sum.cuh"

namespace tokenyard::cuda {
namespace {

__device__ bool begin_pull(const CombineArgs& args) {
  const bool good = begin_combine(args);
  if (good && blockIdx.x == 0) add_link_bytes(args.context, args.handle.rank_counts, args.header.row_bytes);
  return good;
}

// Peers wait for this before they write their expert rows again, and this rank waits for theirs (settle).
__device__ void publish_reads(const Context& c) {
  set_flag_everywhere(c, Flag::reads);
  if (threadIdx.x == 0 && !has_failed(c)) c.state->last_pull = call_number(c);
  __syncthreads();
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_pull_kernel(const __grid_constant__ CombineArgs args) {
  const Context& c = args.context;
  sum_tokens<kDtype, true, true>(args, [&] { return begin_pull(args); });
  if (!is_last_block(c, kCombineEnd)) return;
  publish_reads(c);
  end_call(c);
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
