#pragma once
// A small MoE layer with seeded weights: plain loops, the same bits in every process.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "demo.h"
#include "tokenyard/routing.h"

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
  // rows [count, row_bytes]. A linear gate, then the preset's rule.
  Routing gate(const std::byte* rows, std::int64_t count) const;
  // down(silu(gate(x)) * up(x)), rounded to dtype.
  void expert(int index, const std::byte* row, std::byte* out) const;

 private:
  ModelPreset preset_;
  Dtype dtype_;
  std::int64_t hidden_size_;
  std::int64_t expert_width_;
  std::vector<float> embeddings_;  // [kNeighbours, 256, H]
  std::vector<float> gate_;        // [H, E]
  std::vector<float> gate_bias_;   // [E], for presets that have one
  std::vector<float> gate_up_;     // [E, H, 2 W]
  std::vector<float> down_;        // [E, W, H]
};

}  // namespace tokenyard::cli
