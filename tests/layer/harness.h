#pragma once
// A layer on real ranks beside the model in one process: batches of every rank, weights as a rank holds them, gradients put together again.

#include <memory>
#include <optional>
#include <vector>

#include "layer/model.h"
#include "tokenyard/layer.h"

namespace tokenyard::testing {

struct LayerCase {
  ModelSizes sizes{};
  int ep = 1;
  int tp = 1;
  int outer_dp = 1;
  ExpertTp expert_tp = ExpertTp::virtual_experts;
  Mode mode = Mode::throughput;
  Dtype dtype = Dtype::float32;
  int micro_batches = 1;
  int dense_tp = 1;
  bool same_tokens = false;
  bool sliced_out = false;
  std::optional<Placement> placement{};  // over the exchange's ranks
  double tolerance = 2e-5;
  std::string describe() const;
};

// Numbers as a tensor of any floating type.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Dtype dtype, const Values& values, std::initializer_list<std::int64_t> shape);
  static Tensor zeros(Dtype dtype, std::initializer_list<std::int64_t> shape);
  static Tensor of_bytes(Dtype dtype, const std::vector<std::uint8_t>& bytes, std::initializer_list<std::int64_t> shape);
  TensorView view() const { return view_; }  // of nothing when empty
  Values values() const;

 private:
  std::shared_ptr<std::vector<std::byte>> bytes_;
  TensorView view_;
};

// Matrices [.., rows, columns] as float8, with scales for 128 x 128: of a block, the least power of two that brings it to +-448.
struct Float8Values {
  Float8Values(const Values& values, std::int64_t rows, std::int64_t columns);
  std::vector<std::uint8_t> numbers;
  Values scales;
};

// The weights of one rank, cut from the model, and gradients of the same shapes.
struct RankWeights {
  std::vector<int> experts;  // local
  int shards = 1, shard = 0;
  Tensor gate, gate_bias, selection_bias, w13, w2, w13_bias, w2_bias, shared_w13, shared_w2, shared_gate;
  Tensor w13_scale, w2_scale;  // with ModelSizes::float8
  MoeWeights views() const;
};
RankWeights weights_of(const Model& model, const ExpertGroup& group, const LayerCase& c);
struct RankGradients {
  Tensor gate, gate_bias, w13, w2, w13_bias, w2_bias, shared_w13, shared_w2, shared_gate;
  explicit RankGradients(const RankWeights& weights);
  MoeGradients views() const;
  // Added where the model has them.
  void add_to(Parameters& full, const RankWeights& weights, const ExpertGroup& group) const;
};

// What one rank has: tokens, and the gradient of what the layer makes of them. Rank 1 has none; with same_tokens all have rank 0's.
struct Batch {
  std::int64_t tokens = 0;
  Values x, d_out;
};
Batch batch_of(const LayerCase& c, int rank);
// What the model makes of the batch's tokens.
Values outputs_of(const Model& model, const Batch& batch, std::int64_t hidden);
// A step with ids that are given and every second token masked, and what the model makes of it.
struct Replay {
  std::vector<std::int64_t> ids;   // [tokens][3]
  std::vector<std::uint8_t> mask;  // [tokens]
  Values outputs;
};
Replay replay_of(const Model& model, const Batch& batch, std::int64_t hidden);

ParallelConfig config_of(const LayerCase& c);
ExpertGroupOptions group_options(const LayerCase& c);
Gate gate_of(const ModelSizes& sizes);
MoeLayerOptions layer_options(const LayerCase& c);

// Summed over the ranks of a world, element by element.
Values sum_over_ranks(const World& world, const Values& mine);
void expect_close(const char* what, const Values& values, const Values& expected, double tolerance);

// Forward and backward on all ranks of `world`, against the model.
void expect_single_process_answer(World& world, const LayerCase& c);
// The same on ranks of this process, as many as the case needs.
void run_case(const LayerCase& c);

}  // namespace tokenyard::testing
