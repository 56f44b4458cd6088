// Presets route, and say what the models' configurations say.

#include <gtest/gtest.h>

#include <set>

#include "tokenyard/routing.h"
#include "unit/expect_usage_error.h"

namespace tokenyard {
namespace {

struct Expected {
  std::string_view name;
  int num_experts, top_k, hidden_size, expert_width, shared_expert_width;
  GateKind kind;
  int num_groups, topk_groups;
  float scale;
};

// Restated from the models' config.json, not from the library.
constexpr Expected kExpected[] = {
    {"qwen3-30b-a3b", 128, 8, 2048, 768, 0, GateKind::softmax, 1, 1, 1.0F},
    {"qwen3-235b-a22b", 128, 8, 4096, 1536, 0, GateKind::softmax, 1, 1, 1.0F},
    {"deepseek-v3", 256, 8, 7168, 2048, 2048, GateKind::bias_corrected, 8, 4, 2.5F},
    {"glm-4.5", 160, 8, 5120, 1536, 1536, GateKind::bias_corrected, 1, 1, 2.5F},
    {"glm-4.5-air", 128, 8, 4096, 1408, 1408, GateKind::bias_corrected, 1, 1, 1.0F},
    {"gpt-oss-120b", 128, 4, 2880, 2880, 0, GateKind::softmax, 1, 1, 1.0F},
    {"gpt-oss-20b", 32, 4, 2880, 2880, 0, GateKind::softmax, 1, 1, 1.0F},
    {"intern-s1-pro", 512, 8, 4096, 1536, 0, GateKind::per_group, 8, 1, 1.0F},
};

TEST(Preset, MatchesThePublishedConfigurations) {
  EXPECT_EQ(model_presets().size(), std::size(kExpected));
  for (const Expected& expected : kExpected) {
    SCOPED_TRACE(expected.name);
    const ModelPreset& preset = model_preset(expected.name);
    EXPECT_EQ(preset.num_experts, expected.num_experts);
    EXPECT_EQ(preset.top_k, expected.top_k);
    EXPECT_EQ(preset.hidden_size, expected.hidden_size);
    EXPECT_EQ(preset.expert_width, expected.expert_width);
    EXPECT_EQ(preset.shared_expert_width, expected.shared_expert_width);
    EXPECT_EQ(preset.gate.kind, expected.kind);
    EXPECT_EQ(preset.gate.num_groups, expected.num_groups);
    EXPECT_EQ(preset.gate.topk_groups, expected.topk_groups);
    EXPECT_EQ(preset.gate.scale, expected.scale);
    EXPECT_TRUE(preset.gate.renormalise);
  }
}

TEST(Preset, Routes) {
  for (const ModelPreset& preset : model_presets()) {
    SCOPED_TRACE(preset.name);
    std::vector<float> logits(static_cast<std::size_t>(preset.num_experts));
    for (std::size_t e = 0; e < logits.size(); ++e) logits[e] = static_cast<float>((e * 37) % logits.size()) / 64.0F;
    const std::vector<float> bias(logits.size(), 0.1F);
    RoutingInput input{.logits = {logits.data(), Dtype::float32, {1, preset.num_experts}}};
    if (preset.has_gate_bias) input.bias = {bias.data(), Dtype::float32, {preset.num_experts}};
    EXPECT_EQ(preset.gate.top_k, preset.top_k);
    const Routing routing = route(input, preset.gate);
    EXPECT_EQ(std::set<std::int64_t>(routing.topk_ids.begin(), routing.topk_ids.end()).size(), static_cast<std::size_t>(preset.top_k));
    float sum = 0;
    for (const float weight : routing.topk_weights) sum += weight;
    EXPECT_NEAR(sum, preset.gate.scale, 1e-5);
  }
}

TEST(Preset, AnUnknownNameListsTheKnownOnes) {
  testing::expect_usage_error([] { model_preset("gpt-5"); }, {"\"gpt-5\"", "qwen3-30b-a3b", "deepseek-v3", "intern-s1-pro"});
}

}  // namespace
}  // namespace tokenyard
