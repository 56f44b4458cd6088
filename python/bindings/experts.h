#pragma once
// Weights of experts as they come from Python: lists of arrays, None where there is none.

#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "arrays.h"
#include "tokenyard/experts.h"

namespace tokenyard::python {

using Tensors = std::vector<const Tensor*>;

inline ConstTensorView view_or_none(const Tensor* tensor) { return tensor != nullptr ? tensor->view() : ConstTensorView{}; }
inline TensorView writable_or_none(const Tensor* tensor) { return tensor != nullptr ? tensor->writable() : TensorView{}; }

// (kind, limit, alpha)
Activation parse_activation(const nb::tuple& activation);
// tensors [at ..]: w13, w2, w13_bias, w2_bias
ExpertWeights expert_weights(const Tensors& tensors, std::size_t at);
ExpertGradients expert_gradients(const Tensors& tensors, std::size_t at);

// Weights, biases and what the gate does: one argument of both directions.
struct FeedForward {
  ExpertWeights weights;
  Activation activation;
};

FoldInput fold_input(const Tensor& places, const Tensor& local_ids, const Tensor* row_weights);

}  // namespace tokenyard::python
