// Partial sums go into the owners' staging slots.

#include "kernels/cuda/combine_push.cuh"

namespace tokenyard::cuda {
namespace {

template <Dtype kDtype, bool kAligned>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_push_kernel(const __grid_constant__ CombineArgs args) {
  if (begin_push(args)) push_rows<kDtype, kAligned>(args);
  if (is_last_block(args.context, kEndTicket) && !is_dead(args.context)) set_flag_everywhere(args.context, Flag::partials);
}

}  // namespace

void launch_combine_push(const CombineArgs& args, Stream stream) {
  const CombineLaunch launch(args, stream, false);
  visit_combined(args, [&](auto dtype, auto is_aligned) {
    cudaLaunchKernelEx(&launch.config, combine_push_kernel<dtype.value, is_aligned.value>, args);
  });
}

}  // namespace tokenyard::cuda
