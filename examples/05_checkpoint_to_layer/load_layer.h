#pragma once
// One MoE layer of a checkpoint, as one rank of an EP x TP group holds it. docs/checkpoint_to_layer.md explains it.

#include <tokenyard/tokenyard.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace example {

using namespace tokenyard;

// A tensor of this rank, and its memory.
struct Loaded {
  std::shared_ptr<std::vector<std::byte>> bytes;
  TensorView view;
};

inline Loaded allocate(Dtype dtype, std::initializer_list<std::int64_t> shape) {
  Loaded tensor = {std::make_shared<std::vector<std::byte>>(), TensorView(nullptr, dtype, shape)};
  tensor.bytes->resize(static_cast<std::size_t>(tensor.view.num_elements() * size_of(dtype)));
  tensor.view.data = tensor.bytes->data();
  return tensor;
}

// A whole tensor: what decides the routing is the same on every rank.
inline Loaded load_whole(const Checkpoint& checkpoint, const std::string& name, std::initializer_list<std::int64_t> shape) {
  const FileTensor& file = checkpoint.tensor(name);
  Loaded tensor = allocate(file.dtype.value(), shape);
  if (tensor.bytes->size() != file.bytes.size()) throw Error(name + " has another size than the model's");
  std::memcpy(tensor.bytes->data(), file.bytes.data(), file.bytes.size());
  return tensor;
}

// The part of an expert tensor that `map` names; no other byte of the file is read.
inline Loaded load_part(const Checkpoint& checkpoint, const ExpertSource& source, const ShardMap& map,
                        std::initializer_list<std::int64_t> shape) {
  Loaded tensor = allocate(source_dtype(checkpoint, source), shape);
  load_shard(checkpoint, source, map, {tensor.view.data, tensor.view.dtype, {map.local_elements()}});
  return tensor;
}

// Matrices of float8 with a scale for 128 x 128 elements, in float32.
inline Loaded widened(const Loaded& float8, const Loaded& scales, std::initializer_list<std::int64_t> shape) {
  Loaded tensor = allocate(Dtype::float32, shape);
  const std::int64_t rows = tensor.view.shape[tensor.view.ndim - 2], columns = tensor.view.shape[tensor.view.ndim - 1];
  const std::int64_t blocks = scale_columns(columns, ScaleFormat::float32);
  const float* of_block = scales.view.as<float>();
  for (std::int64_t first = 0; first < tensor.view.num_elements() / columns;) {  // rows that have the same scales
    const std::int64_t count = std::min<std::int64_t>(kQuantiseBlock, rows - first % rows);
    ConstTensorView of_rows(of_block, Dtype::float32, {count, blocks});
    of_rows.strides[0] = 0;
    dequantise({float8.bytes->data() + first * columns, Dtype::float8_e4m3, {count, columns}}, of_rows,
               {tensor.view.as<float>() + first * columns, Dtype::float32, {count, columns}}, ScaleFormat::float32);
    of_block += blocks;
    first += count;
  }
  return tensor;
}

struct LayerFromCheckpoint {
  Loaded gate, gate_bias, w13, w2, w13_bias, w2_bias, w13_scale, w2_scale, shared_w13, shared_w2;
  std::unique_ptr<MoeLayer> layer;
};

inline LayerFromCheckpoint load_layer(const Checkpoint& checkpoint, ModelFamily family, int layer, const ModelPreset& model,
                                      const std::shared_ptr<ExpertGroup>& group) {
  const std::int64_t hidden = model.hidden_size, shards = group->config().mlp_tp;
  const Placement placement = group->placement(model.num_experts);
  const int rank = group->world().rank();
  const std::int64_t local = std::ssize(placement.local_experts(rank)), width = model.expert_width / shards;
  const ExpertShape shape = {.num_experts = model.num_experts, .hidden_size = hidden, .expert_width = model.expert_width};
  const auto part = [&](ExpertTensor tensor, std::initializer_list<std::int64_t> local_shape) {
    return load_part(checkpoint, expert_source(family, layer, tensor, shape), expert_shard(tensor, shape, placement, rank), local_shape);
  };
  LayerFromCheckpoint loaded;
  MoeWeights weights;

  // 1. The gate.
  const GateSource names = gate_source(family, layer);
  loaded.gate = load_whole(checkpoint, names.weight, {model.num_experts, hidden});
  weights.gate.weight = loaded.gate.view;
  if (!names.bias.empty()) {
    loaded.gate_bias = load_whole(checkpoint, names.bias, {model.num_experts});
    (model.has_gate_bias ? weights.gate.selection_bias : weights.gate.logit_bias) = loaded.gate_bias.view;
  }

  // 2. This rank's experts: windows over ep, rows of gate and up and columns of w2 over tp.
  loaded.w13 = part(ExpertTensor::w13, {local, 2, width, hidden});
  loaded.w2 = part(ExpertTensor::w2, {local, hidden, width});
  weights.experts = {.w13 = loaded.w13.view, .w2 = loaded.w2.view};
  const auto blocks = [](std::int64_t elements) { return scale_columns(elements, ScaleFormat::float32); };
  if (loaded.w13.view.dtype == Dtype::float8_e4m3) {  // as DeepSeek-V3 is released: a layer takes it as it is, to go forward
    loaded.w13_scale = part(ExpertTensor::w13_scale, {local, 2, blocks(width), blocks(hidden)});
    loaded.w2_scale = part(ExpertTensor::w2_scale, {local, blocks(hidden), blocks(width)});
    weights.experts.w13_scale = loaded.w13_scale.view;
    weights.experts.w2_scale = loaded.w2_scale.view;
  }
  if (family == ModelFamily::gpt_oss) {
    loaded.w13_bias = part(ExpertTensor::w13_bias, {local, 2, width});
    weights.experts.w13_bias = loaded.w13_bias.view;
    if (group->tp_rank() == 0) {  // the sum over shards has it once
      loaded.w2_bias = part(ExpertTensor::w2_bias, {local, hidden});
      weights.experts.w2_bias = loaded.w2_bias.view;
    }
  }

  // 3. The shared expert: whole, or cut over the ranks of dense_tp.
  if (model.shared_expert_width > 0) {
    const int dense_tp = group->options().dense_tp;
    const ExpertShape one = {.num_experts = 1, .hidden_size = hidden, .expert_width = model.shared_expert_width};
    const Placement cut = Placement::tensor_parallel(1, 1, dense_tp);
    const auto shared = [&](ExpertTensor tensor, std::initializer_list<std::int64_t> local_shape) {
      return load_part(checkpoint, shared_expert_source(family, layer, tensor, one), expert_shard(tensor, one, cut, group->dense_rank()),
                       local_shape);
    };
    const std::int64_t shared_width = model.shared_expert_width / dense_tp;
    loaded.shared_w13 = shared(ExpertTensor::w13, {1, 2, shared_width, hidden});
    loaded.shared_w2 = shared(ExpertTensor::w2, {1, hidden, shared_width});
    if (loaded.shared_w13.view.dtype == Dtype::float8_e4m3) {
      loaded.shared_w13 = widened(loaded.shared_w13, shared(ExpertTensor::w13_scale, {1, 2, blocks(shared_width), blocks(hidden)}),
                                  {1, 2, shared_width, hidden});
      loaded.shared_w2 =
          widened(loaded.shared_w2, shared(ExpertTensor::w2_scale, {1, blocks(hidden), blocks(shared_width)}), {1, hidden, shared_width});
    }
    weights.shared.weights = {.w13 = loaded.shared_w13.view, .w2 = loaded.shared_w2.view};
  }

  // 4. The layer: views of all that, a gate, an activation.
  const ActivationKind kind = family == ModelFamily::gpt_oss ? ActivationKind::clamped : ActivationKind::silu;
  loaded.layer = std::make_unique<MoeLayer>(group, weights, MoeLayerOptions{.gate = model.gate, .activation = {.kind = kind}});
  return loaded;
}

}  // namespace example
