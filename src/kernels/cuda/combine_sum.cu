// The last kernel of a combine by push: adds up all partial sums, which are here.

#include "kernels/cuda/combine_sum.cuh"

namespace tokenyard::cuda {
namespace {

template <Dtype kDtype, bool kAligned>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_sum_kernel(const __grid_constant__ CombineArgs args) {
  const Context& c = args.context;
  if (!block_has_failed(c)) {
    sum_tokens<kDtype, kAligned, false>(args, [] { return true; });
  }
  if (is_last_block(c, kCombineEnd)) end_call(c);
}

const Preloaded preloaded({{combine_sum_kernel<Dtype::float32, true>},
                           {combine_sum_kernel<Dtype::float32, false>},
                           {combine_sum_kernel<Dtype::bfloat16, true>},
                           {combine_sum_kernel<Dtype::bfloat16, false>},
                           {combine_sum_kernel<Dtype::float16, true>},
                           {combine_sum_kernel<Dtype::float16, false>}});

}  // namespace

void launch_combine_sum(const CombineArgs& args, Stream stream) {
  const CombineLaunch launch(args, stream, Resident::any);
  visit_combined(args, [&](auto dtype, auto is_aligned) { launch(combine_sum_kernel<dtype.value, is_aligned.value>, args); });
}

}  // namespace tokenyard::cuda
