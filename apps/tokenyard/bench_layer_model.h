#pragma once
// A preset's layer with random bfloat16 weights: on each rank's GPU the part it holds, and on the host what a token's row must be.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "memory/cuda_buffer.h"
#include "tokenyard/layer.h"

namespace tokenyard::cli {

// Elements of one tensor, uniform in [-scale, scale), drawn once and laid end to end. What holds element i is a function of i.
class DrawnTensor {
 public:
  DrawnTensor(unsigned seed, double scale, std::int64_t longest_row);
  // Elements [first, first + count) in new device memory.
  DeviceBuffer on_device(int device, std::int64_t first, std::int64_t count) const;
  // Consecutive ones, as many as the longest row.
  const float* at(std::int64_t first) const { return values_.data() + first % period_; }

 private:
  std::int64_t period_;
  std::vector<std::uint16_t> bits_;
  std::vector<float> values_;
};

class LayerModel {
 public:
  LayerModel(const ModelPreset& preset, std::int64_t tokens);

  // What this rank holds, with even windows of experts.
  struct OnRank {
    std::vector<DeviceBuffer> memory;
    MoeWeights weights;
  };
  OnRank on_rank(int device, const Placement& placement, int rank) const;
  // [tokens, H] of a rank.
  DeviceBuffer rows(int device, int rank) const;
  // Row `token` of a rank through the experts given, with their weights, and the shared expert: [H]. Products are rounded to bfloat16
  // where the layer's are.
  std::vector<float> expected(int rank, std::int64_t token, std::span<const std::int64_t> experts, std::span<const float> weights) const;
  std::vector<float> logits(int rank, std::int64_t token) const;

  // Operations of a rank whose experts have so many rows, and bytes of weights that it reads.
  double flops(std::int64_t expert_rows) const;
  double weight_bytes(std::int64_t experts_with_rows) const;
  const std::vector<float>& selection_bias() const { return selection_bias_; }

 private:
  const float* row(int rank, std::int64_t token) const { return x_.at((rank * tokens_ + token) * hidden_); }
  std::vector<float> feed_forward(const float* x, const DrawnTensor& w13, const DrawnTensor& w2, std::int64_t expert,
                                  std::int64_t width) const;

  ModelPreset preset_;
  std::int64_t tokens_, hidden_, width_, shared_width_;
  DrawnTensor x_, gate_, w13_, w2_, shared_w13_, shared_w2_;
  std::vector<float> selection_bias_;  // empty without one
};

}  // namespace tokenyard::cli
