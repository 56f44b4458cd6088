#pragma once
// The MoE layer on GPUs: everything is enqueued on one stream, but for rows on their way, beside which the shared expert runs.

#include <optional>

#include "layer/cuda_dense.h"
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
  bool has_shared() const { return shared_.has_value(); }
  bool has_weights() const { return num_local_experts_ > 0 || has_shared(); }
  // Of rows: that of the weights, if there are any here.
  Dtype dtype() const;
  void check_weights() const;
  void check(const ConstTensorView& x, const ConstTensorView& out, const MoeStepOptions& options) const;
  void check_memory(const char* what, const ConstTensorView& view) const { check_on_gpu(what, view, workspace().device()); }
  // Scratch memory for the largest step, and every kernel of one on the GPU: a rank that allocated, or loaded one, later might wait for
  // kernels that wait for it.
  void rehearse();

  // Runs a step; when it cannot go on, those that wait for this rank learn why. owed: calls of the exchange that peers in this step
  // still expect of it.
  template <class Step>
  void guarded(void* stream, Step&& step);
  void leave(int owed, const std::string& reason, void* stream);

  // `step`: nullptr without a backward.
  struct Forward {
    const ConstTensorView& x;
    const MoeStepOptions& options;
    CudaStep* step = nullptr;
  };
  void forward_steps(const Forward& of, const TensorView& out, MoeStep* saved, int& owed);
  CudaStep& prepare(MoeStep& saved, const ConstTensorView& x, const MoeStepOptions& options);
  DeviceRouting run_gate(const Forward& of);
  Received dispatch(const Forward& of, const DeviceRouting& routing, ConstTensorView& shared, int& owed);
  ConstTensorView run_shared(const Forward& of);
  TensorView run_experts(const Forward& of, const Received& received);
  void run_here(const Forward& of, const DeviceRouting& routing, const TensorView& out);
  void run_experts_here(const Forward& of, const DeviceRouting& routing, const TensorView& sums);

  void check_gradients(const MoeBackwardInput& input, const CudaStep* step, const ConstTensorView& d_x,
                       const MoeGradients& gradients) const;
  void backward_steps(const MoeBackwardInput& input, MoeStep& saved, const TensorView& d_x, const MoeGradients& gradients, int& owed);
  // Of rows (in the workspace), and [T,K] of routing weights.
  ConstTensorView experts_backward(const MoeBackwardInput& input, MoeStep& saved, const ExpertGradients& gradients, int& owed);
  ConstTensorView experts_backward_here(const MoeBackwardInput& input, const CudaStep& step, const ExpertGradients& gradients);
  // The gradient of x as far as it goes through the gate is in the workspace.
  void gate_backward(const MoeBackwardInput& input, const CudaStep& step, const ConstTensorView& d_weights, const MoeGradients& gradients);
  void rehearse_backward(void* stream);

  std::shared_ptr<ExpertGroup> group_;
  MoeWeights weights_;
  std::optional<CudaDense> shared_;
  LinearGate gate_;
  Activation activation_;
  int num_local_experts_ = 0;
  int placement_ = -1;
};

}  // namespace tokenyard::layer_internal
