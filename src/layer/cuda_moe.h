#pragma once
// The MoE layer on GPUs: everything is enqueued on one stream, but for rows on their way, beside which the shared expert runs.

#include <optional>

#include "layer/cuda_dense.h"
#include "layer/cuda_shards.h"
#include "layer/gate_step.h"
#include "layer/local_experts.h"
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
  // Shards of experts that meet beside the exchange: with all tokens the same on all of them (each sums up a slice), or each its own.
  bool is_sliced() const { return shards_.has_value() && group_->options().same_tokens; }
  bool is_gathered() const { return shards_.has_value() && !group_->options().same_tokens; }
  // Tokens whose shared expert and sums are this rank's.
  Slice slice_of(std::int64_t tokens) const;
  bool has_shared() const { return shared_.has_value(); }
  bool has_weights() const { return num_local_experts_ > 0 || has_shared(); }
  // Of rows: that of the weights, if there are any here, and the group's for float8 experts.
  Dtype dtype() const;
  // Collective: whether the experts are float8, which ranks that have none learn from the others.
  bool agree_on_float8() const;
  void check_weights() const;
  void check(const ConstTensorView& x, const ConstTensorView& out, const MoeStepOptions& options) const;
  void check_memory(const char* what, const ConstTensorView& view) const { check_on_gpu(what, view, workspace().device()); }
  // Scratch memory for the largest step, and every kernel of one on the GPU: a rank that allocated, or loaded one, later might wait for
  // kernels that wait for it.
  void rehearse();

  int shard_calls_forward(const MoeStepOptions& options) const;
  int shard_calls_backward(const MoeStepOptions& options) const;
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
  // What the experts here make of rows, folded: sums [N,H], zero where a row has no expert here.
  void fold_experts(const Forward& of, const ExpertRows& input, const TensorView& sums);
  // Of rows that each shard has of its own, `number` [1,1] int32 of the first ones of `mine`: sums of the whole experts.
  void fold_gathered(const Forward& of, const ExpertRows& mine, const ConstTensorView& number, const TensorView& sums);
  // Of rows that all shards have: sums of those of the slice.
  void fold_slice(const Forward& of, const ExpertRows& input, const TensorView& sums);
  // Of rows that were dispatched: what combine takes.
  TensorView run_shards(const Forward& of, const Received& received);
  CudaGathered gathered_in(const CudaStep* step, Dtype dtype) const;
  void place(CudaGathered& gathered, StepMemory& memory, Dtype dtype) const;
  std::int64_t gathered_bytes() const;  // of what is placed, but for counts
  void rehearse_shards(void* stream);

  void check_gradients(const MoeBackwardInput& input, const CudaStep* step, const ConstTensorView& d_x,
                       const MoeGradients& gradients) const;
  void backward_steps(const MoeBackwardInput& input, MoeStep& saved, const TensorView& d_x, const MoeGradients& gradients, int& owed);
  // Of rows (in the workspace), and [T,K] of routing weights.
  ConstTensorView experts_backward(const MoeBackwardInput& input, MoeStep& saved, const ExpertGradients& gradients, int& owed);
  ConstTensorView experts_backward_here(const MoeBackwardInput& input, const CudaStep& step, const ExpertGradients& gradients);
  // From g, the gradient of received rows' sums, to what combine takes.
  ExpertRowsGradient places_backward(const MoeStep& saved, const TensorView& g, const ExpertGradients& gradients, void* stream);
  ExpertRowsGradient shards_backward(const CudaStep& step, const TensorView& g, const ExpertGradients& gradients, void* stream);
  // Of fold_experts, fold_gathered and fold_slice: from the gradient of sums to that of rows and weights.
  void fold_backward(const CudaStep& step, const ExpertRows& input, const ConstTensorView& d_sums, const ExpertRowsGradient& d,
                     const ExpertGradients& gradients, void* stream);
  void gathered_backward(const CudaStep& step, const ConstTensorView& d_sums, const ExpertRowsGradient& d, const ExpertGradients& gradients,
                         void* stream);
  void slice_backward(const MoeBackwardInput& input, const CudaStep& step, const ExpertRowsGradient& d, const ExpertGradients& gradients);
  // The gradient of x as far as it goes through the gate is in the workspace.
  void gate_backward(const MoeBackwardInput& input, const CudaStep& step, const ConstTensorView& d_weights, const MoeGradients& gradients);
  void rehearse_backward(void* stream);

  std::shared_ptr<ExpertGroup> group_;
  MoeWeights weights_;
  std::optional<CudaDense> shared_;
  std::optional<CudaShards> shards_;
  LinearGate gate_;
  Activation activation_;
  int num_local_experts_ = 0;
  bool is_float8_ = false;
  int placement_ = -1;
};

}  // namespace tokenyard::layer_internal
