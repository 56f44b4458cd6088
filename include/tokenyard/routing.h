#pragma once
// Gate functions: logits [T,E] -> topk_ids [T,K], topk_weights [T,K]. Arithmetic is float32 and the same bits on every machine;
// ties go to the lower expert id; output slots are ordered by descending selection score. A logit that is not finite never
// selects its expert: slots that find none, and masked tokens, get id -1 and weight 0.

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokenyard/tensor_view.h"

namespace tokenyard {

enum class Score : std::uint8_t { softmax, sigmoid };
enum class GateKind : std::uint8_t { softmax, sigmoid, grouped_max, bias_corrected, per_group };

// A selection and weighting rule. Limits: top_k <= 64, num_experts <= 4096.
struct Gate {
  GateKind kind = GateKind::softmax;
  Score score = Score::softmax;  // bias_corrected and per_group: what turns logits into scores
  int top_k = 1;
  bool renormalise = false;
  float epsilon = 0.0F;  // added to the sum that renormalisation divides by (sigmoid)
  float scale = 1.0F;    // multiplies the weights at the end
  int num_groups = 1;    // groups of E / num_groups consecutive experts
  int topk_groups = 1;   // groups that stay eligible (grouped_max, bias_corrected)

  static Gate softmax(int top_k, bool renormalise, float scale = 1.0F);
  static Gate sigmoid(int top_k, bool renormalise, float scale = 1.0F, float epsilon = 0.0F);
  static Gate grouped_max(int top_k, int num_groups, int topk_groups, bool renormalise = false, float scale = 1.0F);
  static Gate bias_corrected(int top_k, Score score, int num_groups, int topk_groups, bool renormalise, float scale = 1.0F);
  static Gate per_group(int top_k, int num_groups, Score score, bool renormalise, float scale = 1.0F);
};

// Any strides.
struct RoutingInput {
  ConstTensorView logits{};     // [T,E] float32, bfloat16 or float16
  ConstTensorView bias{};       // [E] float32, bias_corrected only
  ConstTensorView mask{};       // [T] uint8, optional: 0 gives ids -1 and weights 0
  ConstTensorView given_ids{};  // [T,K] int64 or int32, optional: replay; weights by the gate's rule at those ids (negative: none)
};

struct Routing {
  int top_k = 0;
  std::vector<std::int64_t> topk_ids;  // [T,K]
  std::vector<float> topk_weights;     // [T,K]
  std::vector<std::int64_t> load;      // [E]: tokens per expert of this batch
  std::int64_t num_tokens() const { return top_k == 0 ? 0 : static_cast<std::int64_t>(topk_ids.size()) / top_k; }
  ConstTensorView ids_view() const { return {topk_ids.data(), Dtype::int64, {num_tokens(), top_k}}; }
  ConstTensorView weights_view() const { return {topk_weights.data(), Dtype::float32, {num_tokens(), top_k}}; }
};

// UsageError, with the values, for shapes, dtypes and gates that do not fit each other.
Routing route(const RoutingInput& input, const Gate& gate);

// A published model's MoE shape, from its configuration file.
struct ModelPreset {
  std::string name;
  int num_experts = 0;
  int top_k = 0;
  int hidden_size = 0;
  int expert_width = 0;         // intermediate size of one expert
  int shared_expert_width = 0;  // 0: no shared expert
  Gate gate;
  bool has_gate_bias = false;  // bias_corrected's bias[E]
};
std::span<const ModelPreset> model_presets();
// UsageError lists the known names.
const ModelPreset& model_preset(std::string_view name);

}  // namespace tokenyard
