// The checkpoints of each model family: written here from what their modeling code does with each tensor, read by the library.

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <map>
#include <optional>

#include "tokenyard/weights.h"
#include "unit/expect_usage_error.h"
#include "unit/temporary_folder.h"

namespace tokenyard {
namespace {

using testing::expect_usage_error;
using testing::TemporaryFolder;

constexpr int kExperts = 3;
constexpr std::int64_t kHidden = 4;
constexpr std::int64_t kWidth = 6;
constexpr ExpertShape kShape = {.num_experts = kExperts, .hidden_size = kHidden, .expert_width = kWidth, .scale_block = 2};

// What an element is, by meaning: every one is another number.
float gate_or_up(int expert, int projection, std::int64_t i, std::int64_t h) {
  return 1000.0F * expert + 500.0F * projection + 10.0F * i + h;
}
float down(int expert, std::int64_t h, std::int64_t i) { return 10000.0F + 1000.0F * expert + 10.0F * i + h; }
float gate_or_up_bias(int expert, int projection, std::int64_t i) { return 20000.0F + 100.0F * expert + 50.0F * projection + i; }
float down_bias(int expert, std::int64_t h) { return 30000.0F + 100.0F * expert + h; }

struct Tensors {
  std::vector<TensorPlan> plans;
  std::map<std::string, std::vector<float>> values;

  void add(const std::string& name, std::vector<std::int64_t> shape, const std::function<float(const std::vector<std::int64_t>&)>& value) {
    std::vector<std::int64_t> at(shape.size(), 0);
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    for (std::int64_t i = 0; i < count; ++i) {
      std::int64_t rest = i;
      for (std::size_t d = shape.size(); d-- > 0; rest /= shape[d]) at[d] = rest % shape[d];
      values[name].push_back(value(at));
    }
    plans.push_back({name, Dtype::float32, std::move(shape)});
  }
  void write(const std::string& path) const {
    SafetensorsWriter writer(path, plans);
    for (const TensorPlan& plan : plans) writer.write(plan.name, std::as_bytes(std::span(values.at(plan.name))));
    writer.finish();
  }
};

// Qwen3-MoE, DeepSeek-V3 and GLM-4.5: nn.Linear weights [out, in] of each expert.
void add_linears(Tensors& tensors, const std::string& prefix, int expert) {
  tensors.add(prefix + "gate_proj.weight", {kWidth, kHidden}, [=](const auto& at) { return gate_or_up(expert, 0, at[0], at[1]); });
  tensors.add(prefix + "up_proj.weight", {kWidth, kHidden}, [=](const auto& at) { return gate_or_up(expert, 1, at[0], at[1]); });
  tensors.add(prefix + "down_proj.weight", {kHidden, kWidth}, [=](const auto& at) { return down(expert, at[0], at[1]); });
}

Tensors checkpoint_of(ModelFamily family) {
  Tensors tensors;
  const std::string mlp = "model.layers.5.mlp.";
  if (family == ModelFamily::gpt_oss) {
    // gate_up = x @ gate_up_proj[e] + bias; gate = gate_up[..., ::2], up = gate_up[..., 1::2]; out = act @ down_proj[e] + bias
    tensors.add(mlp + "experts.gate_up_proj", {kExperts, kHidden, 2 * kWidth},
                [](const auto& at) { return gate_or_up(static_cast<int>(at[0]), static_cast<int>(at[2] % 2), at[2] / 2, at[1]); });
    tensors.add(mlp + "experts.gate_up_proj_bias", {kExperts, 2 * kWidth},
                [](const auto& at) { return gate_or_up_bias(static_cast<int>(at[0]), static_cast<int>(at[1] % 2), at[1] / 2); });
    tensors.add(mlp + "experts.down_proj", {kExperts, kWidth, kHidden},
                [](const auto& at) { return down(static_cast<int>(at[0]), at[2], at[1]); });
    tensors.add(mlp + "experts.down_proj_bias", {kExperts, kHidden},
                [](const auto& at) { return down_bias(static_cast<int>(at[0]), at[1]); });
    return tensors;
  }
  for (int expert = 0; expert < kExperts; ++expert) add_linears(tensors, mlp + "experts." + std::to_string(expert) + ".", expert);
  if (family != ModelFamily::qwen3_moe) add_linears(tensors, mlp + "shared_experts.", 7);
  return tensors;
}

// The value of element `index` of a full tensor, by its meaning.
float value_at(ExpertTensor tensor, std::int64_t index) {
  switch (tensor) {
    case ExpertTensor::w13:
      return gate_or_up(static_cast<int>(index / (2 * kWidth * kHidden)), static_cast<int>(index / (kWidth * kHidden) % 2),
                        index / kHidden % kWidth, index % kHidden);
    case ExpertTensor::w2:
      return down(static_cast<int>(index / (kWidth * kHidden)), index / kWidth % kHidden, index % kWidth);
    case ExpertTensor::w13_bias:
      return gate_or_up_bias(static_cast<int>(index / (2 * kWidth)), static_cast<int>(index / kWidth % 2), index % kWidth);
    default:
      return down_bias(static_cast<int>(index / kHidden), index % kHidden);
  }
}

std::vector<ExpertTensor> tensors_of(ModelFamily family) {
  if (family != ModelFamily::gpt_oss) return {ExpertTensor::w13, ExpertTensor::w2};
  return {ExpertTensor::w13, ExpertTensor::w2, ExpertTensor::w13_bias, ExpertTensor::w2_bias};
}

class FamilyCheckpoint : public ::testing::TestWithParam<ModelFamily> {
 protected:
  FamilyCheckpoint() { tensors_.write(folder_.file("model.safetensors")); }
  TemporaryFolder folder_;
  Tensors tensors_ = checkpoint_of(GetParam());
};
INSTANTIATE_TEST_SUITE_P(Families, FamilyCheckpoint,
                         ::testing::Values(ModelFamily::qwen3_moe, ModelFamily::deepseek_v3, ModelFamily::glm4_moe, ModelFamily::gpt_oss),
                         [](const auto& info) { return std::string(name(info.param)); });

TEST_P(FamilyCheckpoint, EveryRankReadsItsElements) {
  const Checkpoint checkpoint = Checkpoint::open(folder_.path());
  for (const ExpertTensor tensor : tensors_of(GetParam())) {
    const ExpertSource source = expert_source(GetParam(), 5, tensor, kShape);
    EXPECT_EQ(source_dtype(checkpoint, source), Dtype::float32);
    for (const auto& [ep, tp] : {std::pair{1, 1}, {2, 1}, {1, 2}, {2, 3}, {4, 2}}) {
      const Placement placement = Placement::tensor_parallel(kExperts, ep, tp);
      for (int rank = 0; rank < ep * tp; ++rank) {
        const ShardMap map = expert_shard(tensor, kShape, placement, rank).part(2, rank % 2);
        std::vector<float> mine(static_cast<std::size_t>(map.local_elements()), -1.0F);
        load_shard(checkpoint, source, map, {mine.data(), Dtype::float32, {std::ssize(mine)}});
        for (std::int64_t i = 0; i < map.local_elements(); ++i) {
          ASSERT_EQ(mine[static_cast<std::size_t>(i)], value_at(tensor, map.global_index(i))) << name(tensor) << " " << i;
        }
      }
    }
  }
}

// Full tensors written again are the same file.
TEST_P(FamilyCheckpoint, SavingGivesTheSameTensors) {
  const Checkpoint checkpoint = Checkpoint::open(folder_.path());
  std::vector<TensorPlan> planned;
  for (const ExpertTensor tensor : tensors_of(GetParam())) {
    for (TensorPlan& plan : tensor_plans(expert_source(GetParam(), 5, tensor, kShape), Dtype::float32)) planned.push_back(std::move(plan));
  }
  SafetensorsWriter writer(folder_.file("again.safetensors"), planned);
  for (const ExpertTensor tensor : tensors_of(GetParam())) {
    const ExpertSource source = expert_source(GetParam(), 5, tensor, kShape);
    const ShardMap whole = expert_shard(tensor, kShape, Placement::uniform(kExperts, 1), 0);
    std::vector<float> full(static_cast<std::size_t>(whole.local_elements()));
    const TensorView view(full.data(), Dtype::float32, {std::ssize(full)});
    load_shard(checkpoint, source, whole, view);
    save_full(writer, source, view);
  }
  writer.finish();
  const SafetensorsFile again = SafetensorsFile::open(folder_.file("again.safetensors"));
  std::size_t found = 0;
  for (const auto& [name, values] : tensors_.values) {
    if (name.find("shared") != std::string::npos) continue;
    const FileTensor* tensor = again.find(name);
    ASSERT_NE(tensor, nullptr) << name;
    EXPECT_EQ(tensor->shape, checkpoint.tensor(name).shape);
    EXPECT_EQ(std::memcmp(tensor->bytes.data(), values.data(), tensor->bytes.size()), 0) << name;
    ++found;
  }
  EXPECT_EQ(again.tensors().size(), found);
}

TEST_P(FamilyCheckpoint, SharedExpert) {
  const ExpertShape one = {.num_experts = 1, .hidden_size = kHidden, .expert_width = kWidth};
  if (GetParam() != ModelFamily::deepseek_v3 && GetParam() != ModelFamily::glm4_moe) {
    expect_usage_error([&] { shared_expert_source(GetParam(), 5, ExpertTensor::w13, one); }, {name(GetParam()), "no shared expert"});
    return;
  }
  const ShardMap map = expert_shard(ExpertTensor::w2, one, Placement::tensor_parallel(1, 1, 2), 1);
  std::vector<float> mine(static_cast<std::size_t>(map.local_elements()));
  load_shard(Checkpoint::open(folder_.path()), shared_expert_source(GetParam(), 5, ExpertTensor::w2, one), map,
             {mine.data(), Dtype::float32, {std::ssize(mine)}});
  EXPECT_EQ(mine[0], down(7, 0, 3));
  EXPECT_EQ(mine.back(), down(7, 3, 5));
}

// Ranks load a checkpoint as (ep, tp) = (2, 2), become (1, 3), and rank 0 writes it again: one full tensor at a time, the same bytes.
TEST_P(FamilyCheckpoint, LoadReshardGatherAndSaveOnRanks) {
  std::vector<TensorPlan> planned;
  for (const ExpertTensor tensor : tensors_of(GetParam())) {
    for (TensorPlan& plan : tensor_plans(expert_source(GetParam(), 5, tensor, kShape), Dtype::float32)) planned.push_back(std::move(plan));
  }
  // Three ranks hold the three shards, and a fourth nothing.
  const auto maps_of = [](ExpertTensor tensor, int ep, int tp) {
    const Placement placement = Placement::tensor_parallel(kExperts, ep, tp);
    std::vector<ShardMap> maps;
    for (int rank = 0; rank < ep * tp; ++rank) maps.push_back(expert_shard(tensor, kShape, placement, rank));
    while (maps.size() < 4) maps.push_back(ShardMap::of_ranges(maps[0].global_elements(), {}));
    return maps;
  };
  run_ranks(4, [&](World& world) {
    const auto collectives = Collectives::create(world);
    const Checkpoint checkpoint = Checkpoint::open(folder_.path());
    std::optional<SafetensorsWriter> writer;
    if (world.rank() == 0) writer.emplace(folder_.file("resharded.safetensors"), planned);
    for (const ExpertTensor tensor : tensors_of(GetParam())) {
      const ExpertSource source = expert_source(GetParam(), 5, tensor, kShape);
      const std::vector<ShardMap> before = maps_of(tensor, 2, 2);
      const std::vector<ShardMap> after = maps_of(tensor, 1, 3);
      std::vector<float> mine(static_cast<std::size_t>(before[world.rank()].local_elements()));
      std::vector<float> other(static_cast<std::size_t>(after[world.rank()].local_elements()));
      std::vector<float> full(world.rank() == 0 ? static_cast<std::size_t>(after[0].global_elements()) : 0);
      const auto view = [](std::vector<float>& values) { return TensorView(values.data(), Dtype::float32, {std::ssize(values)}); };
      load_shard(checkpoint, source, before[world.rank()], view(mine));
      reshard(*collectives, before, after, view(mine), view(other));
      gather_full(*collectives, after, view(other), 0, view(full));
      if (writer) save_full(*writer, source, view(full));
    }
    if (writer) writer->finish();
  });
  const SafetensorsFile again = SafetensorsFile::open(folder_.file("resharded.safetensors"));
  for (const TensorPlan& plan : planned) {
    const FileTensor* tensor = again.find(plan.name);
    ASSERT_NE(tensor, nullptr);
    EXPECT_EQ(std::memcmp(tensor->bytes.data(), tensors_.values.at(plan.name).data(), tensor->bytes.size()), 0) << plan.name;
  }
}

TEST(FamilyNames, ScalesOfDeepSeek) {
  const ExpertSource source =
      expert_source(ModelFamily::deepseek_v3, 3, ExpertTensor::w13_scale, {.num_experts = 2, .hidden_size = 200, .expert_width = 256});
  ASSERT_EQ(source.blocks.size(), 4U);
  EXPECT_EQ(source.blocks[3].name, "model.layers.3.mlp.experts.1.up_proj.weight_scale_inv");
  EXPECT_EQ(source.blocks[3].shape, (std::vector<std::int64_t>{2, 2}));
}

TEST(FamilyNames, Gates) {
  EXPECT_EQ(gate_source(ModelFamily::qwen3_moe, 2).weight, "model.layers.2.mlp.gate.weight");
  EXPECT_EQ(gate_source(ModelFamily::qwen3_moe, 2).bias, "");
  EXPECT_EQ(gate_source(ModelFamily::glm4_moe, 2).bias, "model.layers.2.mlp.gate.e_score_correction_bias");
  EXPECT_EQ(gate_source(ModelFamily::deepseek_v3, 2).bias, "model.layers.2.mlp.gate.e_score_correction_bias");
  EXPECT_EQ(gate_source(ModelFamily::gpt_oss, 2).weight, "model.layers.2.mlp.router.weight");
  EXPECT_EQ(gate_source(ModelFamily::gpt_oss, 2).bias, "model.layers.2.mlp.router.bias");
  EXPECT_EQ(parse_model_family("glm-4.5-air"), ModelFamily::glm4_moe);
  expect_usage_error([] { parse_model_family("bert"); }, {"model family \"bert\"", "qwen3_moe"});
}

TEST(FamilyNames, WrongFiles) {
  const TemporaryFolder folder;
  checkpoint_of(ModelFamily::qwen3_moe).write(folder.file("model.safetensors"));
  const Checkpoint checkpoint = Checkpoint::open(folder.path());
  const ExpertSource source = expert_source(ModelFamily::qwen3_moe, 5, ExpertTensor::w13, kShape);
  const ShardMap map = expert_shard(ExpertTensor::w13, kShape, Placement::uniform(kExperts, 1), 0);
  std::vector<float> out(static_cast<std::size_t>(map.local_elements()));
  const auto view = [&](Dtype dtype) { return TensorView(out.data(), dtype, {std::ssize(out)}); };
  expect_usage_error([&] { load_shard(checkpoint, source, map, view(Dtype::int32)); },
                     {"model.safetensors: tensor model.layers.5.mlp.experts.0.gate_proj.weight", "float32", "int32"});
  ExpertShape wider = kShape;
  wider.expert_width = 8;
  expect_usage_error([&] { source_dtype(checkpoint, expert_source(ModelFamily::qwen3_moe, 5, ExpertTensor::w13, wider)); },
                     {"experts.0.gate_proj.weight", "its shape is [6, 4], expected [8, 4]"});
  ExpertShape more = kShape;
  more.num_experts = 4;
  expect_usage_error([&] { source_dtype(checkpoint, expert_source(ModelFamily::qwen3_moe, 5, ExpertTensor::w13, more)); },
                     {"tensor model.layers.5.mlp.experts.3.gate_proj.weight: is missing", "there is"});
  expect_usage_error([&] { load_shard(checkpoint, source, ShardMap::whole(3), view(Dtype::float32)); }, {"w13", "of 3 elements"});
  expect_usage_error([&] { expert_source(ModelFamily::qwen3_moe, 5, ExpertTensor::w2_bias, kShape); }, {"qwen3_moe has no expert biases"});
  expect_usage_error([&] { expert_source(ModelFamily::gpt_oss, 5, ExpertTensor::w2_scale, kShape); }, {"gpt_oss has no block scales"});

  Tensors quantised;
  quantised.add("model.layers.5.mlp.experts.gate_up_proj_blocks", {1}, [](const auto&) { return 0.0F; });
  quantised.write(folder.file("quantised.safetensors"));
  expect_usage_error(
      [&] {
        source_dtype(Checkpoint::open(folder.file("quantised.safetensors")),
                     expert_source(ModelFamily::gpt_oss, 5, ExpertTensor::w13, kShape));
      },
      {"quantised.safetensors", "gate_up_proj_blocks", "MXFP4", "dequantised"});
}

}  // namespace
}  // namespace tokenyard
