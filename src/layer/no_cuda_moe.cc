// Instead of cuda_moe.cc, cuda_dense_layer.cc and device_workspace.cc, without TY_CUDA.

#include "core/usage.h"
#include "layer/moe_engine.h"

namespace tokenyard::layer_internal {

class DeviceWorkspace {};

namespace {

[[noreturn]] void refuse() {
  usage_error("this build of tokenyard has no device code; configure it with -DTY_CUDA=ON, or use device = cpu");
}

}  // namespace

std::shared_ptr<DeviceWorkspace> make_device_workspace(const ExpertGroupOptions& /*options*/, const Exchange* /*exchange*/,
                                                       int /*shards*/) {
  refuse();
}
int device_of(const DeviceWorkspace& /*workspace*/) { refuse(); }
std::vector<PhaseSpan> take_spans(DeviceWorkspace& /*workspace*/) { refuse(); }
// NOLINTNEXTLINE(performance-unnecessary-value-param): the function it stands in for keeps the group
std::shared_ptr<DenseEngine> make_cuda_dense(std::shared_ptr<ExpertGroup> /*group*/, const DenseWeights& /*weights*/,
                                             const Activation& /*activation*/) {
  refuse();
}
// NOLINTNEXTLINE(performance-unnecessary-value-param): as above
std::unique_ptr<MoeEngine> make_cuda_moe(std::shared_ptr<ExpertGroup> /*group*/, const MoeWeights& /*weights*/,
                                         const MoeLayerOptions& /*options*/) {
  refuse();
}

}  // namespace tokenyard::layer_internal
