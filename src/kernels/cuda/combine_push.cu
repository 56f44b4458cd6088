// Partial sums go into the owners' staging slots. Where own_blocks are asked for, this rank's own rows are folded meanwhile by
// multiprocessors that have nothing to do with the links.

#include "kernels/cuda/combine_push.cuh"

namespace tokenyard::cuda {
namespace {

template <Dtype kDtype, bool kAligned>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_push_kernel(const __grid_constant__ CombineArgs args) {
  const Context& c = args.context;
  if (static_cast<int>(blockIdx.x) >= args.blocks) {
    if (!block_has_failed(c)) fold_own<kDtype, kAligned>(args);
    return;
  }
  push<kDtype, kAligned>(args);
  if (is_last_block_of(args.blocks, c, kCombineEnd) && !block_has_failed(c)) set_flag_everywhere(c, Flag::partials);
}

const Preloaded preloaded({{combine_push_kernel<Dtype::float32, true>},
                           {combine_push_kernel<Dtype::float32, false>},
                           {combine_push_kernel<Dtype::bfloat16, true>},
                           {combine_push_kernel<Dtype::bfloat16, false>},
                           {combine_push_kernel<Dtype::float16, true>},
                           {combine_push_kernel<Dtype::float16, false>}});

}  // namespace

void launch_combine_push(const CombineArgs& args, Stream stream) {
  const CombineLaunch launch(args, stream, Resident::any, args.own_blocks);
  visit_combined(args, [&](auto dtype, auto is_aligned) { launch(combine_push_kernel<dtype.value, is_aligned.value>, args); });
}

}  // namespace tokenyard::cuda
