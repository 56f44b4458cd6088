// Partial sums go into the owners' staging slots.

#include "kernels/cuda/combine_push.cuh"

namespace tokenyard::cuda {
namespace {

template <Dtype kDtype, bool kAligned>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_push_kernel(const __grid_constant__ CombineArgs args) {
  push<kDtype, kAligned>(args);
  if (is_last_block(args.context, kCombineEnd) && !block_has_failed(args.context)) set_flag_everywhere(args.context, Flag::partials);
}

const Preloaded preloaded({{combine_push_kernel<Dtype::float32, true>},
                           {combine_push_kernel<Dtype::float32, false>},
                           {combine_push_kernel<Dtype::bfloat16, true>},
                           {combine_push_kernel<Dtype::bfloat16, false>},
                           {combine_push_kernel<Dtype::float16, true>},
                           {combine_push_kernel<Dtype::float16, false>}});

}  // namespace

void launch_combine_push(const CombineArgs& args, Stream stream) {
  const CombineLaunch launch(args, stream, Resident::any);
  visit_combined(args, [&](auto dtype, auto is_aligned) { launch(combine_push_kernel<dtype.value, is_aligned.value>, args); });
}

}  // namespace tokenyard::cuda
