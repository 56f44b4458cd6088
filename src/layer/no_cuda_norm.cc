// Instead of cuda_norm.cc, without TY_CUDA.

#include "core/usage.h"
#include "tokenyard/norm.h"

namespace tokenyard {
namespace {

[[noreturn]] void refuse() {
  usage_error("this build of tokenyard has no device code; configure it with -DTY_CUDA=ON, or leave out the stream to compute on CPUs");
}

}  // namespace

void residual_norm(const ResidualInput& /*input*/, const RmsNorm& /*norm*/, const NormOutput& /*output*/, void* /*stream*/) { refuse(); }
void reduce_scatter_norm(DeviceCollectives& /*collectives*/, const ResidualInput& /*input*/, const RmsNorm& /*norm*/,
                         const NormOutput& /*output*/, void* /*stream*/) {
  refuse();
}
void norm_all_gather(DeviceCollectives& /*collectives*/, const ResidualInput& /*input*/, const RmsNorm& /*norm*/,
                     const NormOutput& /*output*/, void* /*stream*/) {
  refuse();
}
void residual_norm_backward(const NormGradient& /*input*/, const RmsNorm& /*norm*/, const TensorView& /*d_x*/,
                            const TensorView& /*d_weight*/, void* /*stream*/) {
  refuse();
}
void reduce_scatter_norm_backward(DeviceCollectives& /*collectives*/, const NormGradient& /*input*/, const RmsNorm& /*norm*/,
                                  const NormOutput& /*d*/, const TensorView& /*d_weight*/, void* /*stream*/) {
  refuse();
}
void norm_all_gather_backward(DeviceCollectives& /*collectives*/, const NormGradient& /*input*/, const RmsNorm& /*norm*/,
                              const TensorView& /*d_x*/, const TensorView& /*d_weight*/, void* /*stream*/) {
  refuse();
}

}  // namespace tokenyard
