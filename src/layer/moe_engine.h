#pragma once
// What stands behind MoeLayer: one engine per kind of device, as behind Exchange.

#include <memory>

#include "layer/steps.h"

namespace tokenyard::layer_internal {

class MoeEngine {
 public:
  virtual ~MoeEngine() = default;
  // saved: nullptr when nothing will go backwards.
  virtual void forward(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, MoeActivations* saved) = 0;
  virtual void backward(const MoeBackwardInput& input, const MoeActivations& saved, const TensorView& d_x,
                        const MoeGradients& gradients) = 0;
  virtual void warm_up(std::span<const std::int64_t> token_counts) = 0;
};

// What stands behind a DenseLayer on a GPU.
class DenseEngine {
 public:
  virtual ~DenseEngine() = default;
  virtual void forward(const ConstTensorView& x, const TensorView& out, DenseActivations* saved, void* stream) = 0;
  struct Backward {
    const ConstTensorView &x, &d_out;
    const TensorView& d_x;
    const DenseGradients& gradients;
    void* stream;
  };
  virtual void backward(const Backward& call, const DenseActivations& saved) = 0;
  virtual void check_gradients(const DenseGradients& gradients) const = 0;
};
// Collective with dense_tp.
std::shared_ptr<DenseEngine> make_cuda_dense(std::shared_ptr<ExpertGroup> group, const DenseWeights& weights, const Activation& activation);

// UsageError for weights that do not fit the group, or each other.
std::unique_ptr<MoeEngine> make_cuda_moe(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options);
std::unique_ptr<MoeEngine> make_cpu_moe(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options);

// What a group on GPUs holds for its layers. `exchange` may be nullptr; shards: ranks that experts are cut over and meet beside it, or 1.
// UsageError without TY_CUDA.
std::shared_ptr<DeviceWorkspace> make_device_workspace(const ExpertGroupOptions& options, const Exchange* exchange, int shards);
int device_of(const DeviceWorkspace& workspace);
std::vector<PhaseSpan> take_spans(DeviceWorkspace& workspace);

}  // namespace tokenyard::layer_internal
