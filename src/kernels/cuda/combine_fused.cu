// Push and sum in one kernel, for small batches: one launch, and what a sum needs to know is looked up while partial sums
// are under way.

#include "kernels/cuda/combine_push.cuh"
#include "kernels/cuda/combine_sum.cuh"

namespace tokenyard::cuda {
namespace {

// Blocks wait for what other blocks of this grid push, so all of them must be resident: a cooperative launch.
template <Dtype kDtype, bool kAligned>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_fused_kernel(const __grid_constant__ CombineArgs args) {
  const Context& c = args.context;
  const std::uint64_t call = push<kDtype, kAligned>(args).call;
  if (is_last_block(c, kCombinePushed) && !block_has_failed(c)) set_flag_everywhere(c, Flag::partials, call);
  if (!block_has_failed(c)) {
    sum_tokens<kDtype, kAligned, false>(args,
                                        [&] { return wait_for_all(c, Flag::partials, Phase::combine_rows, call, is_last_to_wait(args)); });
  }
  if (is_last_block(c, kCombineEnd, false)) end_call(c, block_has_failed(c), call);
}

const Preloaded preloaded({{combine_fused_kernel<Dtype::float32, true>},
                           {combine_fused_kernel<Dtype::float32, false>},
                           {combine_fused_kernel<Dtype::bfloat16, true>},
                           {combine_fused_kernel<Dtype::bfloat16, false>},
                           {combine_fused_kernel<Dtype::float16, true>},
                           {combine_fused_kernel<Dtype::float16, false>}});

}  // namespace

void launch_combine_fused(const CombineArgs& args, Stream stream) {
  const CombineLaunch launch(args, stream, Resident::together);
  visit_combined(args, [&](auto dtype, auto is_aligned) { launch(combine_fused_kernel<dtype.value, is_aligned.value>, args); });
}

}  // namespace tokenyard::cuda
