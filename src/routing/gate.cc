#include "routing/gate.h"

#include <cmath>

#include "core/usage.h"
#include "routing/arithmetic.h"

namespace tokenyard {
namespace routing_internal {
namespace {

std::string_view name_of(GateKind kind) {
  switch (kind) {
    case GateKind::softmax:
      return "softmax";
    case GateKind::sigmoid:
      return "sigmoid";
    case GateKind::grouped_max:
      return "grouped_max";
    case GateKind::bias_corrected:
      return "bias_corrected";
    case GateKind::per_group:
      return "per_group";
  }
  usage_error("gate kind = {}; use one of the named kinds", static_cast<int>(kind));
}

void check_logits(const ConstTensorView& logits) {
  const bool floating = logits.dtype == Dtype::float32 || logits.dtype == Dtype::bfloat16 || logits.dtype == Dtype::float16;
  if (logits.ndim != 2 || !floating || logits.shape[0] < 0) {
    usage_error("logits are {}; expected [tokens, experts] in float32, bfloat16 or float16", describe(logits));
  }
  if (logits.shape[1] < 1 || logits.shape[1] > kMaxExperts) {
    usage_error("logits are {}, so num_experts = {}; it is in 1..{}", describe(logits), logits.shape[1], kMaxExperts);
  }
  if (logits.data == nullptr && logits.shape[0] > 0) usage_error("logits are {} without data; pass their address", describe(logits));
}

void check_top_k(int top_k, int num_experts) {
  if (top_k < 1 || top_k > kMaxTopK) usage_error("top_k = {}; it is in 1..{}", top_k, kMaxTopK);
  if (top_k > num_experts) {
    usage_error("top_k = {} exceeds num_experts = {}; choose top_k <= {}", top_k, num_experts, num_experts);
  }
}

void check_numbers(const Gate& gate) {
  if (!std::isfinite(gate.scale)) usage_error("scale = {}; it is finite", gate.scale);
  if (!std::isfinite(gate.epsilon) || gate.epsilon < 0) usage_error("epsilon = {}; it is finite and not negative", gate.epsilon);
  if (gate.epsilon > 0 && is_softmax_over_chosen(gate)) {
    usage_error("epsilon = {} with a softmax over the chosen, whose sum is at least 1 before it is divided by; leave it 0", gate.epsilon);
  }
}

void check_groups(const Gate& gate, int num_experts) {
  const std::string_view kind = name_of(gate.kind);
  const bool limits_groups = gate.kind == GateKind::grouped_max || gate.kind == GateKind::bias_corrected;
  const bool has_groups = limits_groups || gate.kind == GateKind::per_group;
  if (!has_groups && gate.num_groups != 1) {
    usage_error("num_groups = {}, and {} has no groups; leave it 1, or choose grouped_max, bias_corrected or per_group", gate.num_groups,
                kind);
  }
  if (!limits_groups && gate.topk_groups != 1) {
    usage_error("topk_groups = {}, and {} keeps all groups; leave it 1, or choose grouped_max or bias_corrected", gate.topk_groups, kind);
  }
  if (gate.num_groups < 1 || num_experts % gate.num_groups != 0) {
    usage_error("num_groups = {} does not divide num_experts = {}; choose a divisor", gate.num_groups, num_experts);
  }
  if (gate.kind == GateKind::per_group && gate.top_k % gate.num_groups != 0) {
    usage_error("num_groups = {} does not divide top_k = {}; per_group takes top_k / num_groups experts from each group", gate.num_groups,
                gate.top_k);
  }
  if (gate.topk_groups < 1 || gate.topk_groups > gate.num_groups) {
    usage_error("topk_groups = {}; with num_groups = {} it is in 1..{}", gate.topk_groups, gate.num_groups, gate.num_groups);
  }
  const int eligible = gate.topk_groups * (num_experts / gate.num_groups);
  if (limits_groups && gate.top_k > eligible) {
    usage_error("top_k = {} exceeds the {} experts of topk_groups = {} groups of {}; keep more groups or choose top_k <= {}", gate.top_k,
                eligible, gate.topk_groups, num_experts / gate.num_groups, eligible);
  }
}

void check_bias(const ConstTensorView& bias, GateKind kind, std::int64_t num_experts) {
  if (kind != GateKind::bias_corrected) {
    if (bias) usage_error("bias is {}, and {} takes none; leave it out or choose bias_corrected", describe(bias), name_of(kind));
    return;
  }
  if (bias.ndim != 1 || bias.dtype != Dtype::float32 || bias.shape[0] != num_experts || bias.data == nullptr) {
    usage_error("bias is {}; bias_corrected expects [{}] float32 (zeros for none)", bias ? describe(bias) : "absent", num_experts);
  }
}

void check_mask(const ConstTensorView& mask, std::int64_t num_tokens) {
  if (!mask) return;
  if (mask.ndim != 1 || mask.dtype != Dtype::uint8 || mask.shape[0] != num_tokens || (mask.data == nullptr && num_tokens > 0)) {
    usage_error("mask is {}; expected [{}] uint8, one entry for each row of logits", describe(mask), num_tokens);
  }
}

void check_given(const ConstTensorView& ids, std::int64_t num_tokens, int top_k) {
  if (!ids) return;
  const bool integer = ids.dtype == Dtype::int64 || ids.dtype == Dtype::int32;
  const bool fits = ids.ndim == 2 && ids.shape[0] == num_tokens && ids.shape[1] == top_k;
  if (!integer || !fits || (ids.data == nullptr && num_tokens > 0)) {
    usage_error("given_ids are {}; expected [{}, {}] int64 or int32: the rows of logits, and the gate's top_k", describe(ids), num_tokens,
                top_k);
  }
}

}  // namespace

Score score_of(const Gate& gate) {
  switch (gate.kind) {
    case GateKind::softmax:
    case GateKind::grouped_max:
      return Score::softmax;
    case GateKind::sigmoid:
      return Score::sigmoid;
    default:
      return gate.score;
  }
}

bool is_softmax_over_chosen(const Gate& gate) {
  return score_of(gate) == Score::softmax && gate.renormalise && gate.kind != GateKind::bias_corrected;
}

void check(const RoutingInput& input, const Gate& gate) {
  check_logits(input.logits);
  const std::int64_t num_tokens = input.logits.shape[0];
  const int num_experts = static_cast<int>(input.logits.shape[1]);
  check_top_k(gate.top_k, num_experts);
  check_numbers(gate);
  check_groups(gate, num_experts);
  check_bias(input.bias, gate.kind, num_experts);
  check_mask(input.mask, num_tokens);
  check_given(input.given_ids, num_tokens, gate.top_k);
}

}  // namespace routing_internal

Gate Gate::softmax(int top_k, bool renormalise, float scale) {
  return {.kind = GateKind::softmax, .top_k = top_k, .renormalise = renormalise, .scale = scale};
}

Gate Gate::sigmoid(int top_k, bool renormalise, float scale, float epsilon) {
  return {
      .kind = GateKind::sigmoid, .score = Score::sigmoid, .top_k = top_k, .renormalise = renormalise, .epsilon = epsilon, .scale = scale};
}

Gate Gate::grouped_max(int top_k, int num_groups, int topk_groups, bool renormalise, float scale) {
  return {.kind = GateKind::grouped_max,
          .top_k = top_k,
          .renormalise = renormalise,
          .scale = scale,
          .num_groups = num_groups,
          .topk_groups = topk_groups};
}

Gate Gate::bias_corrected(int top_k, Score score, int num_groups, int topk_groups, bool renormalise, float scale) {
  return {.kind = GateKind::bias_corrected,
          .score = score,
          .top_k = top_k,
          .renormalise = renormalise,
          .epsilon = 1e-20F,  // as published (DeepSeek-V3's modeling code)
          .scale = scale,
          .num_groups = num_groups,
          .topk_groups = topk_groups};
}

Gate Gate::per_group(int top_k, int num_groups, Score score, bool renormalise, float scale) {
  return {
      .kind = GateKind::per_group, .score = score, .top_k = top_k, .renormalise = renormalise, .scale = scale, .num_groups = num_groups};
}

}  // namespace tokenyard
