// Instead of device_experts.cc, without TY_CUDA.

#include "core/usage.h"
#include "tokenyard/device_experts.h"

namespace tokenyard {

struct DeviceExperts::State {};

namespace {

[[noreturn]] void refuse() {
  usage_error("this build of tokenyard has no device code; configure it with -DTY_CUDA=ON, or use the functions of experts.h on the CPU");
}

}  // namespace

DeviceRowGroups DeviceRowGroups::of(const Received& /*received*/) { refuse(); }
DeviceExperts::DeviceExperts(const DeviceExpertsOptions& /*options*/) { refuse(); }
DeviceExperts::~DeviceExperts() = default;
DeviceExperts::DeviceExperts(DeviceExperts&&) noexcept = default;
DeviceExperts& DeviceExperts::operator=(DeviceExperts&&) noexcept = default;
DeviceRowGroups DeviceExperts::gather(const ConstTensorView& /*ids*/, int /*experts*/, void* /*stream*/) { refuse(); }
void DeviceExperts::grouped_gemm(const ConstTensorView& /*x*/, const DeviceRowGroups& /*groups*/, const ConstTensorView& /*w*/,
                                 const ConstTensorView& /*bias*/, const TensorView& /*y*/, void* /*stream*/) {
  refuse();
}
void DeviceExperts::grouped_gemm_dgrad(const ConstTensorView& /*dy*/, const DeviceRowGroups& /*groups*/, const ConstTensorView& /*w*/,
                                       const TensorView& /*dx*/, void* /*stream*/) {
  refuse();
}
void DeviceExperts::grouped_gemm_wgrad(const ConstTensorView& /*dy*/, const ConstTensorView& /*x*/, const DeviceRowGroups& /*groups*/,
                                       const TensorView& /*dw*/, void* /*stream*/) {
  refuse();
}
void DeviceExperts::grouped_gemm_scaled(const Scaled& /*x*/, const DeviceRowGroups& /*groups*/, const Scaled& /*w*/,
                                        const ConstTensorView& /*bias*/, const TensorView& /*y*/, void* /*stream*/) {
  refuse();
}
void DeviceExperts::clear_padding(const DeviceRowGroups& /*groups*/, const TensorView& /*rows*/, void* /*stream*/) { refuse(); }
void DeviceExperts::permute(const ConstTensorView& /*rows*/, const DeviceRowGroups& /*groups*/, const TensorView& /*out*/,
                            void* /*stream*/) {
  refuse();
}
void DeviceExperts::unpermute(const FoldInput& /*input*/, const DeviceRowGroups& /*groups*/, const TensorView& /*out*/, void* /*stream*/) {
  refuse();
}
void DeviceExperts::unpermute_backward(const FoldInput& /*input*/, const DeviceRowGroups& /*groups*/, const ConstTensorView& /*d_out*/,
                                       const TensorView& /*d_places*/, const TensorView& /*d_row_weights*/, void* /*stream*/) {
  refuse();
}
void DeviceExperts::experts_forward(const Forward& /*input*/, const DeviceRowGroups& /*groups*/, const ExpertWeights& /*weights*/,
                                    const Activation& /*activation*/, const TensorView& /*y*/, void* /*stream*/) {
  refuse();
}
void DeviceExperts::experts_backward(const Backward& /*call*/, const DeviceRowGroups& /*groups*/, const ExpertWeights& /*weights*/,
                                     const Activation& /*activation*/, void* /*stream*/) {
  refuse();
}

}  // namespace tokenyard
