#pragma once
// What a step leaves: behind DenseActivations and MoeActivations.

#include <memory>

#include "layer/buffer.h"
#include "layer/gate_step.h"
#include "layer/local_experts.h"
#include "layer/shards.h"
#include "tokenyard/layer.h"

namespace tokenyard::layer_internal {

struct CudaDenseMemory;  // cuda_step.h
struct CudaStep;

struct DenseStep {
  ShardCounts counts;         // dense_tp: rows of each rank
  Buffer rows;                // and all of them
  Buffer y;                   // before the sigmoid
  std::vector<float> scores;  // [T]: sigmoids
  ExpertActivations activations;
  Buffer partial, d_y, d_partial;           // scratch
  std::shared_ptr<CudaDenseMemory> on_gpu;  // of a layer there: only this
};

struct MoeStep {
  GateStep gate;
  Received received;                    // with an exchange
  std::vector<std::int32_t> local_ids;  // without: the routing's ids
  ExpertRows mine;                      // rows that this rank received, or has
  ShardCounts counts;                   // tp: rows of each rank
  Buffer rows, row_ids, row_weights;    // and all of them
  ExpertRows input;                     // of the experts
  ExpertStep experts;
  DenseActivations shared;
  std::shared_ptr<CudaStep> on_gpu;  // of a layer there: only this and `received`
  ConstTensorView logits;            // there
};

}  // namespace tokenyard::layer_internal
