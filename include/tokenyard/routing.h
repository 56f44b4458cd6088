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

// Training. The choice of experts is a constant: gradients flow through the weights, and the losses through the scores. All of these
// take what route() was given and gave; UsageError, with the shapes, for what does not fit. Sums over tokens are float64.

// Adds d loss / d logits to d_logits [T,E] float32 (dense), given d_weights [T,K] float32: d loss / d topk_weights.
void add_weights_gradient(const RoutingInput& input, const Gate& gate, const Routing& routing, const ConstTensorView& d_weights,
                          const TensorView& d_logits);

// What the losses need of a batch. Tokens that are masked or have no finite logit do not count.
struct GateStatistics {
  std::vector<std::int64_t> load;   // [E]: (token, k) pairs per expert
  std::vector<double> score_sums;   // [E]: over tokens, of p = the score divided by the token's sum of scores (1 for a softmax)
  double squared_log_sum_exps = 0;  // over tokens, of logsumexp(logits)^2
  std::int64_t num_tokens = 0;
  // Of both batches together: ranks of a group, or micro-batches.
  void add(const GateStatistics& other);
};
GateStatistics gate_statistics(const RoutingInput& input, const Gate& gate, const Routing& routing);

// alpha * (E / sum load) * sum_e load_e * mean_t p_te of one layer, over all tokens of the statistics; 0 when nothing was routed.
// Source: "Switch Transformers" (arXiv 2101.03961), eq. 4; for sigmoid scores "DeepSeek-V3" (arXiv 2412.19437), eq. 17 to 19.
double balance_loss(const GateStatistics& statistics, double alpha);
// alpha * mean_t logsumexp(logits_t)^2. Source: "ST-MoE" (arXiv 2202.08906), eq. 5.
double z_loss(const GateStatistics& statistics, double alpha);
// Add the losses' gradients to d_logits [T,E] float32; `statistics` are of the whole group, `input` is this rank's part of it.
void add_balance_gradient(const RoutingInput& input, const Gate& gate, const GateStatistics& statistics, double alpha,
                          const TensorView& d_logits);
void add_z_gradient(const RoutingInput& input, const Gate& gate, const GateStatistics& statistics, double alpha,
                    const TensorView& d_logits);

// bias_corrected without a loss: bias[e] -= gamma where load[e] is above the mean, += gamma where it is below.
// Source: "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664), algorithm 1.
void update_gate_bias(std::span<float> bias, std::span<const std::int64_t> load, float gamma);

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
