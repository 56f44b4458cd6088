// Instead of device_route.cc, without TY_CUDA.

#include "core/usage.h"
#include "tokenyard/device_routing.h"

namespace tokenyard {
namespace {

[[noreturn]] void refuse() {
  usage_error("this build of tokenyard has no device code; configure it with -DTY_CUDA=ON, or use the functions of routing.h on the CPU");
}

}  // namespace

void route(const RoutingInput& /*input*/, const Gate& /*gate*/, const DeviceRouting& /*routing*/, void* /*stream*/) { refuse(); }
void add_weights_gradient(const RoutingInput& /*input*/, const Gate& /*gate*/, const DeviceRouting& /*routing*/,
                          const ConstTensorView& /*d_weights*/, const TensorView& /*d_logits*/, void* /*stream*/) {
  refuse();
}
void gate_statistics(const RoutingInput& /*input*/, const Gate& /*gate*/, const DeviceRouting& /*routing*/,
                     const DeviceGateStatistics& /*statistics*/, void* /*stream*/) {
  refuse();
}
void balance_loss(const DeviceGateStatistics& /*statistics*/, double /*alpha*/, const TensorView& /*loss*/, void* /*stream*/) { refuse(); }
void z_loss(const DeviceGateStatistics& /*statistics*/, double /*alpha*/, const TensorView& /*loss*/, void* /*stream*/) { refuse(); }
void add_balance_gradient(const RoutingInput& /*input*/, const Gate& /*gate*/, const DeviceGateStatistics& /*statistics*/, double /*alpha*/,
                          const TensorView& /*d_logits*/, void* /*stream*/) {
  refuse();
}
void add_z_gradient(const RoutingInput& /*input*/, const Gate& /*gate*/, const DeviceGateStatistics& /*statistics*/, double /*alpha*/,
                    const TensorView& /*d_logits*/, void* /*stream*/) {
  refuse();
}
void update_gate_bias(const TensorView& /*bias*/, const ConstTensorView& /*load*/, float /*gamma*/, void* /*stream*/) { refuse(); }

}  // namespace tokenyard
