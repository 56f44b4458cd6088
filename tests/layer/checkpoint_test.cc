// The guide's code: checkpoints of several families, loaded as docs/checkpoint_to_layer.md does it, against the model they hold.

#include <gtest/gtest.h>

#include <filesystem>

#include "../examples/05_checkpoint_to_layer/load_layer.h"
#include "layer/harness.h"

namespace tokenyard::testing {
namespace {

struct Family {
  ModelFamily family;
  Flavour flavour;
};
constexpr Family kFamilies[] = {{ModelFamily::qwen3_moe, Flavour::qwen},
                                {ModelFamily::deepseek_v3, Flavour::deepseek},
                                {ModelFamily::glm4_moe, Flavour::deepseek},
                                {ModelFamily::gpt_oss, Flavour::gpt_oss}};

class File {
 public:
  explicit File(const std::string& name) : path_(std::filesystem::path(::testing::TempDir()) / name) {}
  ~File() { std::filesystem::remove(path_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

struct Part {
  ExpertSource source;
  const Values* values;
};

void write_checkpoint(const std::string& path, const Family& of, const Model& model) {
  const ModelSizes& s = model.sizes();
  const Parameters& p = model.parameters();
  const ExpertShape shape = {.num_experts = s.experts, .hidden_size = s.hidden, .expert_width = s.width};
  const ExpertShape one = {.num_experts = 1, .hidden_size = s.hidden, .expert_width = s.shared_width};
  std::vector<Part> parts = {{expert_source(of.family, 3, ExpertTensor::w13, shape), &p.experts.w13},
                             {expert_source(of.family, 3, ExpertTensor::w2, shape), &p.experts.w2}};
  if (!p.experts.w13_bias.empty()) {
    parts.push_back({expert_source(of.family, 3, ExpertTensor::w13_bias, shape), &p.experts.w13_bias});
    parts.push_back({expert_source(of.family, 3, ExpertTensor::w2_bias, shape), &p.experts.w2_bias});
  }
  if (p.shared.experts > 0) {
    parts.push_back({shared_expert_source(of.family, 3, ExpertTensor::w13, one), &p.shared.w13});
    parts.push_back({shared_expert_source(of.family, 3, ExpertTensor::w2, one), &p.shared.w2});
  }
  const GateSource gate = gate_source(of.family, 3);
  const Values& bias = p.gate_bias.empty() ? p.selection_bias : p.gate_bias;
  std::vector<TensorPlan> plans = {{gate.weight, Dtype::float32, {s.experts, s.hidden}}};
  if (!gate.bias.empty()) plans.push_back({gate.bias, Dtype::float32, {s.experts}});
  for (const Part& part : parts) {
    for (const TensorPlan& plan : tensor_plans(part.source, Dtype::float32)) plans.push_back(plan);
  }
  SafetensorsWriter writer(path, plans);
  const std::vector<float> weight(p.gate.begin(), p.gate.end()), biases(bias.begin(), bias.end());
  writer.write(gate.weight, std::as_bytes(std::span(weight)));
  if (!gate.bias.empty()) writer.write(gate.bias, std::as_bytes(std::span(biases)));
  for (const Part& part : parts) {
    const std::vector<float> values(part.values->begin(), part.values->end());
    save_full(writer, part.source, {values.data(), Dtype::float32, {std::ssize(values)}});
  }
  writer.finish();
}

void expect_model(World& world, const std::string& path, const Family& of, const LayerCase& c) {
  const Model model(c.sizes);
  const ModelPreset preset = {.name = "small",
                              .num_experts = c.sizes.experts,
                              .top_k = c.sizes.top_k,
                              .hidden_size = static_cast<int>(c.sizes.hidden),
                              .expert_width = static_cast<int>(c.sizes.width),
                              .shared_expert_width = model.parameters().shared.experts > 0 ? static_cast<int>(c.sizes.shared_width) : 0,
                              .gate = gate_of(c.sizes),
                              .has_gate_bias = of.flavour == Flavour::deepseek};
  const auto group = std::make_shared<ExpertGroup>(world, config_of(c), group_options(c));
  const example::LayerFromCheckpoint loaded = example::load_layer(Checkpoint::open(path), of.family, 3, preset, group);
  const Batch batch = batch_of(c, world.rank());
  const Tensor x(Dtype::float32, batch.x, {batch.tokens, c.sizes.hidden});
  const Tensor out = Tensor::zeros(Dtype::float32, {batch.tokens, c.sizes.hidden});
  loaded.layer->forward(x.view(), out.view());
  Values expected;
  for (std::int64_t t = 0; t < batch.tokens; ++t) {
    const Values row = model.forward(&batch.x[t * c.sizes.hidden]);
    expected.insert(expected.end(), row.begin(), row.end());
  }
  expect_close("out", out.values(), expected, c.tolerance);
}

TEST(CheckpointToLayer, EveryFamilyOnEveryLayout) {
  for (const Family& of : kFamilies) {
    const ModelSizes sizes = {.flavour = of.flavour};
    const File file("tokenyard_layer_" + std::string(name(of.family)) + ".safetensors");
    write_checkpoint(file.path(), of, Model(sizes));
    for (const LayerCase& c : {LayerCase{.sizes = sizes}, LayerCase{.sizes = sizes, .ep = 2, .tp = 2, .dense_tp = 2},
                               LayerCase{.sizes = sizes, .ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered, .dense_tp = 4},
                               LayerCase{.sizes = sizes, .ep = 4}, LayerCase{.sizes = sizes, .tp = 4}}) {
      SCOPED_TRACE(std::string(name(of.family)) + ": " + c.describe());
      run_ranks(c.ep * c.tp, [&](World& world) { expect_model(world, file.path(), of, c); });
    }
  }
}

// A layer without experts, in a checkpoint as Hugging Face names it, on shards of dense_tp.
TEST(CheckpointToLayer, DenseLayers) {
  const Model model({.flavour = Flavour::deepseek});
  const FeedForward& f = model.parameters().shared;
  const File file("tokenyard_dense_layer.safetensors");
  {
    const std::vector<float> w13(f.w13.begin(), f.w13.end()), w2(f.w2.begin(), f.w2.end());
    SafetensorsWriter writer(file.path(), {{"model.layers.0.mlp.gate_proj.weight", Dtype::float32, {f.width, f.hidden}},
                                           {"model.layers.0.mlp.up_proj.weight", Dtype::float32, {f.width, f.hidden}},
                                           {"model.layers.0.mlp.down_proj.weight", Dtype::float32, {f.hidden, f.width}}});
    const auto gate_and_up = std::as_bytes(std::span(w13));
    writer.write("model.layers.0.mlp.gate_proj.weight", gate_and_up.first(gate_and_up.size() / 2));
    writer.write("model.layers.0.mlp.up_proj.weight", gate_and_up.last(gate_and_up.size() / 2));
    writer.write("model.layers.0.mlp.down_proj.weight", std::as_bytes(std::span(w2)));
    writer.finish();
  }
  for (const ModelFamily family : {ModelFamily::qwen3_moe, ModelFamily::deepseek_v3, ModelFamily::glm4_moe}) {
    run_ranks(2, [&](World& world) {
      const LayerCase c = {.sizes = model.sizes(), .ep = 2, .dense_tp = 2};
      const auto group = std::make_shared<ExpertGroup>(world, config_of(c), group_options(c));
      const Checkpoint checkpoint = Checkpoint::open(file.path());
      const ExpertShape shape = {.num_experts = 1, .hidden_size = f.hidden, .expert_width = f.width};
      const Placement placement = Placement::tensor_parallel(1, 1, 2);
      const auto part = [&](ExpertTensor tensor, std::initializer_list<std::int64_t> local_shape) {
        return example::load_part(checkpoint, dense_layer_source(family, 0, tensor, shape),
                                  expert_shard(tensor, shape, placement, group->dense_rank()), local_shape);
      };
      const example::Loaded w13 = part(ExpertTensor::w13, {1, 2, f.width / 2, f.hidden});
      const example::Loaded w2 = part(ExpertTensor::w2, {1, f.hidden, f.width / 2});
      DenseLayer layer(group, {.weights = {.w13 = w13.view, .w2 = w2.view}});
      const Batch batch = batch_of(c, world.rank());
      const Tensor x(Dtype::float32, batch.x, {batch.tokens, f.hidden});
      layer.forward(x.view(), x.view());
      Model dense = model;  // without its experts
      for (double& value : dense.parameters().experts.w2) value = 0;
      Values expected;
      for (std::int64_t t = 0; t < batch.tokens; ++t) {
        const Values row = dense.forward(&batch.x[t * f.hidden]);
        expected.insert(expected.end(), row.begin(), row.end());
      }
      expect_close("out", x.values(), expected, c.tolerance);
    });
  }
  EXPECT_THROW(dense_layer_source(ModelFamily::gpt_oss, 0, ExpertTensor::w13, {.num_experts = 1}), UsageError);
  EXPECT_THROW(dense_layer_source(ModelFamily::qwen3_moe, 0, ExpertTensor::w13, {.num_experts = 2}), UsageError);
}

}  // namespace
}  // namespace tokenyard::testing
