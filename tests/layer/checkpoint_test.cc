// The guide's code: checkpoints of several families, loaded as docs/checkpoint_to_layer.md does it, against the model they hold.

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>

#include "../examples/05_checkpoint_to_layer/load_layer.h"
#include "layer/harness.h"
#include "unit/expect_usage_error.h"

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
  Dtype dtype;
  std::vector<std::byte> bytes;
};

template <class Number>
std::vector<std::byte> bytes_of(const std::vector<Number>& numbers) {
  const auto bytes = std::as_bytes(std::span(numbers));
  return {bytes.begin(), bytes.end()};
}
std::vector<std::byte> floats_of(const Values& values) { return bytes_of(std::vector<float>(values.begin(), values.end())); }

// w13 and w2 of experts, or of the shared expert; with float8 also their scales.
void add_parts(std::vector<Part>& parts, const ModelSizes& sizes, const FeedForward& f,
               const std::function<ExpertSource(ExpertTensor)>& source_of) {
  const auto add = [&](ExpertTensor tensor, ExpertTensor scale, const Values& values, std::int64_t rows, std::int64_t columns) {
    if (!sizes.float8) return parts.push_back({source_of(tensor), Dtype::float32, floats_of(values)});
    const Float8Values float8(values, rows, columns);
    parts.push_back({source_of(tensor), Dtype::float8_e4m3, bytes_of(float8.numbers)});
    parts.push_back({source_of(scale), Dtype::float32, floats_of(float8.scales)});
  };
  add(ExpertTensor::w13, ExpertTensor::w13_scale, f.w13, f.width, f.hidden);
  add(ExpertTensor::w2, ExpertTensor::w2_scale, f.w2, f.hidden, f.width);
}

void write_checkpoint(const std::string& path, const Family& of, const Model& model) {
  const ModelSizes& s = model.sizes();
  const Parameters& p = model.parameters();
  const ExpertShape shape = {.num_experts = s.experts, .hidden_size = s.hidden, .expert_width = s.width};
  const ExpertShape one = {.num_experts = 1, .hidden_size = s.hidden, .expert_width = s.shared_width};
  std::vector<Part> parts;
  add_parts(parts, s, p.experts, [&](ExpertTensor tensor) { return expert_source(of.family, 3, tensor, shape); });
  if (!p.experts.w13_bias.empty()) {
    parts.push_back({expert_source(of.family, 3, ExpertTensor::w13_bias, shape), Dtype::float32, floats_of(p.experts.w13_bias)});
    parts.push_back({expert_source(of.family, 3, ExpertTensor::w2_bias, shape), Dtype::float32, floats_of(p.experts.w2_bias)});
  }
  if (p.shared.experts > 0) {
    add_parts(parts, s, p.shared, [&](ExpertTensor tensor) { return shared_expert_source(of.family, 3, tensor, one); });
  }
  const GateSource gate = gate_source(of.family, 3);
  const Values& bias = p.gate_bias.empty() ? p.selection_bias : p.gate_bias;
  std::vector<TensorPlan> plans = {{gate.weight, Dtype::float32, {s.experts, s.hidden}}};
  if (!gate.bias.empty()) plans.push_back({gate.bias, Dtype::float32, {s.experts}});
  for (const Part& part : parts) {
    for (const TensorPlan& plan : tensor_plans(part.source, part.dtype)) plans.push_back(plan);
  }
  SafetensorsWriter writer(path, plans);
  const std::vector<float> weight(p.gate.begin(), p.gate.end()), biases(bias.begin(), bias.end());
  writer.write(gate.weight, std::as_bytes(std::span(weight)));
  if (!gate.bias.empty()) writer.write(gate.bias, std::as_bytes(std::span(biases)));
  for (const Part& part : parts) {
    save_full(writer, part.source, {part.bytes.data(), part.dtype, {std::ssize(part.bytes) / size_of(part.dtype)}});
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

// As DeepSeek-V3 is released: experts stay float8, on shards that cut no block.
TEST(CheckpointToLayer, Float8Experts) {
  const ModelSizes sizes = {.flavour = Flavour::deepseek, .hidden = 144, .width = 256, .shared_width = 256, .float8 = true};
  const Family of = {ModelFamily::deepseek_v3, Flavour::deepseek};
  const File file("tokenyard_layer_float8.safetensors");
  write_checkpoint(file.path(), of, Model(sizes));
  for (const LayerCase& c : {LayerCase{.sizes = sizes}, LayerCase{.sizes = sizes, .ep = 2, .tp = 2, .dense_tp = 2},
                             LayerCase{.sizes = sizes, .ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered}}) {
    SCOPED_TRACE(c.describe());
    run_ranks(c.ep * c.tp, [&](World& world) { expect_model(world, file.path(), of, c); });
  }
  const LayerCase too_many = {.sizes = sizes, .tp = 4};
  run_ranks(4, [&](World& world) {
    expect_usage_error([&] { expect_model(world, file.path(), of, too_many); }, {"w13_scale", "4 shards", "fewer shards"});
  });
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
