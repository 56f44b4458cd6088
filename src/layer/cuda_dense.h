#pragma once
// A feed-forward of all tokens on a GPU: whole, or cut over the ranks of dense_tp. Then rows are gathered before and partial sums reduced
// after, by counts that stay on the device.

#include <optional>

#include "layer/cuda_shards.h"
#include "layer/cuda_step.h"
#include "layer/device_calls.h"
#include "layer/device_workspace.h"

namespace tokenyard::layer_internal {

class CudaDense {
 public:
  // UsageError for weights that are not on this GPU.
  CudaDense(ExpertGroup& group, const DenseWeights& weights, const Activation& activation);

  Dtype dtype() const { return weights_.weights.w13.dtype; }
  std::int64_t hidden_size() const { return weights_.weights.w13.shape[3]; }
  const ConstTensorView& gate() const { return weights_.gate; }
  bool is_cut() const { return ranks_.has_value(); }
  std::int64_t most_rows() const;  // of a step
  void check_gradients(const DenseGradients& gradients) const;

  // What a forward leaves is placed in `memory`.
  void place(CudaDenseStep& step, StepMemory& memory, std::int64_t tokens, Dtype dtype) const;
  // step: nullptr without a backward. out may be x without one.
  void forward(const ConstTensorView& x, const TensorView& out, const CudaDenseStep* step, void* stream);
  struct Backward {
    ConstTensorView x, d_out;
    const CudaDenseStep* step = nullptr;
    const DenseGradients* gradients = nullptr;
    void* stream = nullptr;
  };
  // dx [T,H]: as far as it goes through the products. What goes through the gate is d_logits() gate.
  void backward(const Backward& call, const TensorView& dx);
  const float* d_logits() const { return workspace_.gradients().shared_logits.as<float>(); }

  // Scratch memory of the largest step, and every kernel of one, without a call of the collectives: see CudaMoe.
  void rehearse(void* stream);
  void rehearse_backward(void* stream);
  std::int64_t step_bytes() const;  // at the most, of what a step keeps, but for its numbers

  // From here on, peers in the step wait for calls of this rank: until they are made, or leave() tells them why they will not be.
  void begin_forward() {
    if (ranks_) ranks_->begin(3);
  }
  void begin_backward() {
    if (ranks_) ranks_->begin(2);
  }
  void leave(const std::string& reason, void* stream) {
    if (ranks_) ranks_->leave(reason, stream);
  }

 private:
  DeviceRowGroups gather(const ConstTensorView& x, const CudaDenseStep* step, TensorView& all, void* stream);
  ConstTensorView gate_backward(const Backward& call);
  TensorView counts_of(const CudaDenseStep* step) const { return step != nullptr ? step->counts : workspace_.dense().counts(); }

  DeviceWorkspace& workspace_;
  std::optional<CudaShards> ranks_;
  std::int64_t most_tokens_;
  DenseWeights weights_;
  Activation activation_;
};

// Scratch memory of a backward of so many places: its sizes hang on them and on the number of experts alone, so products are narrow.
void rehearse_products(DeviceWorkspace& workspace, const ExpertWeights& of, const Activation& activation, std::int64_t places,
                       void* stream);
// UsageErrors.
void check_dense_on_gpu(const DenseWeights& weights, int gpu);

}  // namespace tokenyard::layer_internal
