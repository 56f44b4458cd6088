// A combine by pull with ordinary loads: small batches, and groups.

#include "kernels/cuda/combine_pull.cuh"

namespace tokenyard::cuda {
namespace {

template <Dtype kDtype>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_pull_kernel(const __grid_constant__ CombineArgs args) {
  sum_tokens<kDtype, true, true>(args, Pieces(piece_counter(args)), [&] { return begin_pull(args); });
  finish_pull(args.context);
}

const Preloaded preloaded({{combine_pull_kernel<Dtype::float32>},
                           {combine_pull_kernel<Dtype::bfloat16>},
                           {combine_pull_kernel<Dtype::float16>}});

}  // namespace

void launch_combine_pull(const CombineArgs& args, Stream stream) {
  if (args.mode == Mode::throughput && launch_combine_pull_async(args, stream)) return;
  const CombineLaunch launch(args, stream, Resident::any);
  visit_combined(args.dtype, [&](auto dtype) { launch(combine_pull_kernel<dtype.value>, args); });
}

}  // namespace tokenyard::cuda
