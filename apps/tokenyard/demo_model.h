#pragma once
// The demo's model: seeded weights, the same bits in every process, and one expert in plain loops to check the layer with.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "demo.h"
#include "tokenyard/layer.h"

namespace tokenyard::cli {

class DemoModel {
 public:
  explicit DemoModel(const DemoSettings& settings);

  Dtype dtype() const { return dtype_; }
  std::int64_t hidden_size() const { return hidden_size_; }
  std::int64_t row_bytes() const { return hidden_size_ * size_of(dtype_); }
  int num_experts() const { return preset_.num_experts; }
  int top_k() const { return preset_.top_k; }

  // The row of the byte at `position`: its own embedding mixed with those of its neighbours and of the position.
  void embed(const std::string& text, std::int64_t position, std::byte* row) const;
  // What a rank holds of the layer, as views: the experts of its window.
  MoeWeights weights(std::span<const int> local_experts) const;
  const Gate& gate() const { return preset_.gate; }
  // sums[h] += weight * down(silu(gate(x)) * up(x)) in double; magnitudes: the same of the last product's terms.
  void add_expert(int index, const std::byte* row, double weight, std::span<double> sums, std::span<double> magnitudes) const;

 private:
  ModelPreset preset_;
  Dtype dtype_;
  std::int64_t hidden_size_;
  std::int64_t expert_width_;
  std::vector<float> embeddings_;  // [kNeighbours, 256, H]
  std::vector<float> gate_;        // [E, H]
  std::vector<float> gate_bias_;   // [E], for presets that have one
  std::vector<float> gate_up_;     // [E, 2, W, H]
  std::vector<float> down_;        // [E, H, W]
};

}  // namespace tokenyard::cli
