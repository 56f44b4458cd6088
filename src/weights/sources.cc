// The names and shapes that model families give their tensors, from the modeling code that Hugging Face transformers publishes.

#include "core/name_table.h"
#include "weights/block_shape.h"

namespace tokenyard {
namespace {

using weights_internal::block_shape;
using weights_internal::BlockShape;

constexpr NamedValue<ModelFamily> kFamilies[] = {
    {ModelFamily::qwen3_moe, "qwen3_moe"},     {ModelFamily::qwen3_moe, "qwen3-30b-a3b"}, {ModelFamily::qwen3_moe, "qwen3-235b-a22b"},
    {ModelFamily::deepseek_v3, "deepseek_v3"}, {ModelFamily::deepseek_v3, "deepseek-v3"}, {ModelFamily::glm4_moe, "glm4_moe"},
    {ModelFamily::glm4_moe, "glm-4.5"},        {ModelFamily::glm4_moe, "glm-4.5-air"},    {ModelFamily::gpt_oss, "gpt_oss"},
    {ModelFamily::gpt_oss, "gpt-oss-120b"},    {ModelFamily::gpt_oss, "gpt-oss-20b"},
};

bool is_bias(ExpertTensor tensor) { return tensor == ExpertTensor::w13_bias || tensor == ExpertTensor::w2_bias; }
bool is_scale(ExpertTensor tensor) { return tensor == ExpertTensor::w13_scale || tensor == ExpertTensor::w2_scale; }

void check_family_has(ModelFamily family, ExpertTensor tensor) {
  if (is_bias(tensor) && family != ModelFamily::gpt_oss)
    usage_error("{}: {} has no expert biases; gpt_oss has", name(tensor), name(family));
  if (is_scale(tensor) && family != ModelFamily::deepseek_v3) {
    usage_error("{}: {} has no block scales; deepseek_v3 has", name(tensor), name(family));
  }
}

std::string mlp_of(int layer) {
  if (layer < 0) usage_error("layer = {}; it is >= 0", layer);
  return fmt::format("model.layers.{}.mlp.", layer);
}

// One tensor per expert and projection: <prefix><projection>.weight, or its scales.
SourceBlock own_tensor(const std::string& prefix, ExpertTensor tensor, int projection, const BlockShape& block) {
  const bool is_down = tensor == ExpertTensor::w2 || tensor == ExpertTensor::w2_scale;
  const char* projection_name = is_down ? "down_proj" : projection == 0 ? "gate_proj" : "up_proj";
  return {.name = fmt::format("{}{}.{}", prefix, projection_name, is_scale(tensor) ? "weight_scale_inv" : "weight"),
          .shape = {block.rows, block.columns},
          .offset = 0,
          .row_stride = block.columns,
          .column_stride = 1};
}

// gpt-oss keeps all experts in one tensor, transposed ([E, H, 2I] and [E, I, H]), gate and up alternating along the 2I.
SourceBlock part_of_fused(const std::string& mlp, ExpertTensor tensor, std::int64_t experts, std::int64_t index, const BlockShape& block) {
  const std::int64_t expert = index / block.blocks_per_expert;
  const std::int64_t projection = index % block.blocks_per_expert;
  const std::int64_t rows = block.rows;
  const std::int64_t columns = block.columns;
  switch (tensor) {
    case ExpertTensor::w13:
      return {mlp + "experts.gate_up_proj", {experts, columns, 2 * rows}, expert * columns * 2 * rows + projection, 2, 2 * rows};
    case ExpertTensor::w2:
      return {mlp + "experts.down_proj", {experts, columns, rows}, expert * columns * rows, 1, rows};
    case ExpertTensor::w13_bias:
      return {mlp + "experts.gate_up_proj_bias", {experts, 2 * rows}, expert * 2 * rows + projection, 2, 2};
    default:
      return {mlp + "experts.down_proj_bias", {experts, rows}, expert * rows, 1, 1};
  }
}

ExpertSource empty_source(ExpertTensor tensor, const BlockShape& block) {
  return {.tensor = tensor, .rows = block.rows, .columns = block.columns, .blocks = {}};
}

// Of all tokens, so of one expert.
ExpertSource feed_forward_source(const char* what, const std::string& prefix, ExpertTensor tensor, const ExpertShape& shape) {
  if (shape.num_experts != 1) usage_error("{} has num_experts = {}; it is one, whatever its width", what, shape.num_experts);
  const BlockShape block = block_shape(tensor, shape);
  ExpertSource source = empty_source(tensor, block);
  for (int b = 0; b < block.blocks_per_expert; ++b) source.blocks.push_back(own_tensor(prefix, tensor, b, block));
  return source;
}

}  // namespace

std::string_view name(ModelFamily family) { return name_in(kFamilies, family); }
ModelFamily parse_model_family(std::string_view text) { return parse_in(kFamilies, "model family", text); }

ExpertSource expert_source(ModelFamily family, int layer, ExpertTensor tensor, const ExpertShape& shape) {
  check_family_has(family, tensor);
  const BlockShape block = block_shape(tensor, shape);
  const std::string mlp = mlp_of(layer);
  ExpertSource source = empty_source(tensor, block);
  const std::int64_t blocks = std::int64_t{shape.num_experts} * block.blocks_per_expert;
  for (std::int64_t b = 0; b < blocks; ++b) {
    if (family == ModelFamily::gpt_oss) {
      source.blocks.push_back(part_of_fused(mlp, tensor, shape.num_experts, b, block));
    } else {
      const std::string prefix = fmt::format("{}experts.{}.", mlp, b / block.blocks_per_expert);
      source.blocks.push_back(own_tensor(prefix, tensor, static_cast<int>(b % block.blocks_per_expert), block));
    }
  }
  return source;
}

ExpertSource shared_expert_source(ModelFamily family, int layer, ExpertTensor tensor, const ExpertShape& shape) {
  check_family_has(family, tensor);
  if (family != ModelFamily::deepseek_v3 && family != ModelFamily::glm4_moe) {
    usage_error("{} has no shared expert; deepseek_v3 and glm4_moe have", name(family));
  }
  return feed_forward_source("the shared expert", mlp_of(layer) + "shared_experts.", tensor, shape);
}

ExpertSource dense_layer_source(ModelFamily family, int layer, ExpertTensor tensor, const ExpertShape& shape) {
  check_family_has(family, tensor);
  if (family == ModelFamily::gpt_oss) usage_error("{} has no dense layers; the other families may have", name(family));
  return feed_forward_source("a dense layer", mlp_of(layer), tensor, shape);
}

GateSource gate_source(ModelFamily family, int layer) {
  const std::string mlp = mlp_of(layer);
  switch (family) {
    case ModelFamily::gpt_oss:
      return {mlp + "router.weight", mlp + "router.bias"};
    case ModelFamily::deepseek_v3:
    case ModelFamily::glm4_moe:
      return {mlp + "gate.weight", mlp + "gate.e_score_correction_bias"};
    case ModelFamily::qwen3_moe:
      return {mlp + "gate.weight", ""};
  }
  usage_error("model family {}; use one of the named ones", static_cast<int>(family));
}

}  // namespace tokenyard
