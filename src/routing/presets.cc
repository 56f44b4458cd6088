// Shapes and gates of published models, from their configuration files on Hugging Face.

#include <algorithm>
#include <array>

#include "core/usage.h"
#include "tokenyard/routing.h"

namespace tokenyard {
namespace {

const std::array<ModelPreset, 8>& table() {
  constexpr bool kRenormalise = true;
  static const std::array<ModelPreset, 8> presets = {{
      {.name = "qwen3-30b-a3b",
       .num_experts = 128,
       .top_k = 8,
       .hidden_size = 2048,
       .expert_width = 768,
       .gate = Gate::softmax(8, kRenormalise)},
      {.name = "qwen3-235b-a22b",
       .num_experts = 128,
       .top_k = 8,
       .hidden_size = 4096,
       .expert_width = 1536,
       .gate = Gate::softmax(8, kRenormalise)},
      {.name = "deepseek-v3",
       .num_experts = 256,
       .top_k = 8,
       .hidden_size = 7168,
       .expert_width = 2048,
       .shared_expert_width = 2048,
       .gate = Gate::bias_corrected(8, Score::sigmoid, 8, 4, kRenormalise, 2.5F),
       .has_gate_bias = true},
      {.name = "glm-4.5",
       .num_experts = 160,
       .top_k = 8,
       .hidden_size = 5120,
       .expert_width = 1536,
       .shared_expert_width = 1536,
       .gate = Gate::bias_corrected(8, Score::sigmoid, 1, 1, kRenormalise, 2.5F),
       .has_gate_bias = true},
      {.name = "glm-4.5-air",
       .num_experts = 128,
       .top_k = 8,
       .hidden_size = 4096,
       .expert_width = 1408,
       .shared_expert_width = 1408,
       .gate = Gate::bias_corrected(8, Score::sigmoid, 1, 1, kRenormalise, 1.0F),
       .has_gate_bias = true},
      {.name = "gpt-oss-120b",
       .num_experts = 128,
       .top_k = 4,
       .hidden_size = 2880,
       .expert_width = 2880,
       .gate = Gate::softmax(4, kRenormalise)},
      {.name = "gpt-oss-20b",
       .num_experts = 32,
       .top_k = 4,
       .hidden_size = 2880,
       .expert_width = 2880,
       .gate = Gate::softmax(4, kRenormalise)},
      {.name = "intern-s1-pro",
       .num_experts = 512,
       .top_k = 8,
       .hidden_size = 4096,
       .expert_width = 1536,
       .gate = Gate::per_group(8, 8, Score::softmax, kRenormalise)},
  }};
  return presets;
}

}  // namespace

std::span<const ModelPreset> model_presets() { return table(); }

const ModelPreset& model_preset(std::string_view name) {
  const auto found = std::find_if(table().begin(), table().end(), [name](const ModelPreset& preset) { return preset.name == name; });
  if (found != table().end()) return *found;
  std::string known;
  for (const ModelPreset& preset : table()) known += (known.empty() ? "" : ", ") + preset.name;
  usage_error("unknown model preset \"{}\"; known: {}", name, known);
}

}  // namespace tokenyard
