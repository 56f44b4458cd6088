#pragma once
// The MoE layer on GPUs, forward: everything is enqueued on one stream, but for rows on their way, beside which the shared expert runs.

#include "layer/device_workspace.h"
#include "layer/gate_step.h"
#include "layer/moe_engine.h"

namespace tokenyard::layer_internal {

class CudaMoe final : public MoeEngine {
 public:
  CudaMoe(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options);
  void forward(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, MoeActivations* saved) override;
  void backward(const MoeBackwardInput& input, const MoeActivations& saved, const TensorView& d_x, const MoeGradients& gradients) override;
  void warm_up(std::span<const std::int64_t> token_counts) override;

 private:
  DeviceWorkspace& workspace() const { return *group_->workspace(); }
  bool has_shared() const { return static_cast<bool>(weights_.shared.weights.w13); }
  bool has_weights() const { return num_local_experts_ > 0 || has_shared(); }
  // Of rows: that of the weights, if there are any here.
  Dtype dtype() const;
  void check_weights() const;
  void check(const ConstTensorView& x, const ConstTensorView& out, const MoeStepOptions& options) const;
  void check_memory(const char* what, const ConstTensorView& view) const;
  // Scratch memory for the largest step, and every kernel of one on the GPU: a rank that allocated, or loaded one, later might wait for
  // kernels that wait for it.
  void rehearse();

  // owed: calls of the exchange that peers in this step still expect of this rank.
  void forward_steps(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, int& owed);
  void leave(int owed, const std::string& reason);
  DeviceRouting run_gate(const ConstTensorView& x, const MoeStepOptions& options);
  Received dispatch(const ConstTensorView& x, const DeviceRouting& routing, const MoeStepOptions& options, ConstTensorView& shared,
                    int& owed);
  ConstTensorView run_shared(const ConstTensorView& x, void* stream);
  TensorView run_experts(const Received& received, std::int64_t hidden_size, void* stream);
  void run_here(const ConstTensorView& x, const DeviceRouting& routing, const TensorView& out, void* stream);

  std::shared_ptr<ExpertGroup> group_;
  MoeWeights weights_;
  LinearGate gate_;
  Activation activation_;
  int num_local_experts_ = 0;
  int placement_ = -1;
};

}  // namespace tokenyard::layer_internal
