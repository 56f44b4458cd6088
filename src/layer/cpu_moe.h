#pragma once
// The MoE layer on CPUs.

#include <optional>

#include "layer/moe_engine.h"

namespace tokenyard::layer_internal {

class CpuMoe final : public MoeEngine {
 public:
  CpuMoe(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options);
  void forward(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, MoeActivations* saved) override;
  void backward(const MoeBackwardInput& input, const MoeActivations& saved, const TensorView& d_x, const MoeGradients& gradients) override;
  void warm_up(std::span<const std::int64_t> token_counts) override;

 private:
  // Tokens of this step whose gate, shared expert and sum are this rank's: all of them, or with same_tokens a slice.
  Slice slice_of(std::int64_t tokens) const;
  bool is_sliced() const { return group_->options().same_tokens && group_->tp() != nullptr; }
  void check(const ConstTensorView& x, const ConstTensorView& out, const MoeStepOptions& options) const;
  void check_gradients(const MoeGradients& gradients) const;

  // In whose next call peers would wait for this rank if it left the step now.
  struct Awaited {
    bool exchange = false;
    bool dense = false;
    bool tp = false;
  };
  Awaited awaited() const;
  // Runs a step; when it cannot go on, those that wait for this rank learn why at once.
  template <class Step>
  void guarded(Step&& step);
  void leave(const Awaited& awaited, Failure why);
  void forward_steps(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, MoeActivations* saved, Awaited& left);
  void backward_steps(const MoeBackwardInput& input, MoeStep& step, const TensorView& d_x, const MoeGradients& gradients, Awaited& left);

  // Forward: rows to the experts, and sums back.
  Pending<Received> start_dispatch(const ConstTensorView& x, const MoeStepOptions& options, const MoeStep& step, bool is_saved);
  void take_rows(const ConstTensorView& x, MoeStep& step);
  void gather_shards(MoeStep& step);
  ConstTensorView run_shared(const ConstTensorView& x, MoeStep& step, bool is_saved);
  ConstTensorView reduce_shards(const ConstTensorView& partial, const MoeStep& step);
  void sum(const ConstTensorView& mine, const ConstTensorView& shared, const TensorView& out, const MoeStepOptions& options, MoeStep& step);
  // Backward: gradients to the experts, and those of rows and routing weights back.
  ConstTensorView received_gradient(const MoeBackwardInput& input, const MoeStep& step);
  ConstTensorView partial_gradient(const ConstTensorView& mine, const MoeBackwardInput& input, const MoeStep& step);
  ExpertRowsGradient reduce_gradient(const ExpertRowsGradient& d, const MoeStep& step);
  ExpertRowsGradient return_gradient(const ExpertRowsGradient& mine, const MoeStep& step);

  std::shared_ptr<ExpertGroup> group_;
  LinearGate gate_;
  LocalExperts experts_;
  std::optional<DenseLayer> shared_;
  int placement_ = -1;
  Pending<Received> rows_;  // under way
  MoeActivations unsaved_;  // of forwards without a backward
  Buffer partial_, reduced_, shared_out_, d_shared_, d_partial_, d_rows_, d_row_weights_, d_mine_, d_mine_weights_;
  Received d_received_;
  std::shared_ptr<void> gradient_memory_;
};

}  // namespace tokenyard::layer_internal
