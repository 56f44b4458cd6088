#pragma once
// From received rows to this rank's partial sums: what its experts make of each row, folded with the routing weights; and backwards.

#include "layer/buffer.h"
#include "tokenyard/experts.h"
#include "tokenyard/layer.h"

namespace tokenyard::layer_internal {

// N rows and what they want of this rank's experts.
struct ExpertRows {
  ConstTensorView rows;         // [N,H]
  ConstTensorView local_ids;    // [N,K] int32, -1: none here
  ConstTensorView row_weights;  // [N,K] float32
};
// Their gradients.
struct ExpertRowsGradient {
  TensorView rows;         // [N,H]
  TensorView row_weights;  // [N,K] float32
};

// What forward leaves for backward.
struct ExpertStep {
  RowGroups groups;
  ExpertActivations activations;
  Buffer places;  // [P,H], before the fold
};

// UsageError for gradients that are not of these weights: float32, dense, of the same shape.
void check_gradients(const ExpertWeights& weights, const ExpertGradients& gradients);

class LocalExperts {
 public:
  LocalExperts(const ExpertWeights& weights, const Activation& activation, int num_local_experts)
      : weights_(weights), activation_(activation), num_local_experts_(num_local_experts) {}

  void check_differentiable() const;
  void check_gradients(const ExpertGradients& gradients) const {
    if (num_local_experts_ > 0) layer_internal::check_gradients(weights_, gradients);
  }
  // partial [N,H]: zero where a row has no expert here.
  void forward(const ExpertRows& input, const TensorView& partial, ExpertStep& step, bool is_saved) const;
  void backward(const ExpertRows& input, const ConstTensorView& d_partial, ExpertStep& step, const ExpertRowsGradient& d,
                const ExpertGradients& gradients);

 private:
  ExpertWeights weights_;
  Activation activation_;
  int num_local_experts_;
  Buffer d_y_, d_x_;
};

}  // namespace tokenyard::layer_internal
