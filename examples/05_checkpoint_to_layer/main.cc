// A checkpoint as small as they get, its layer on EP 2 x TP 2, and the same on one rank: the sums agree.

#include <cmath>
#include <filesystem>
#include <iostream>

#include "load_layer.h"

using namespace example;

const ModelPreset kModel = {
    .name = "small", .num_experts = 8, .top_k = 2, .hidden_size = 32, .expert_width = 16, .gate = Gate::softmax(2, /*renormalise=*/true)};
constexpr std::int64_t kTokens = 6;

std::vector<float> random_values(const std::string& name, std::int64_t count) {
  std::vector<float> values(static_cast<std::size_t>(count));
  initialise(name, {.distribution = Distribution::normal, .scale = 0.3F}, ShardMap::whole(count), {values.data(), Dtype::float32, {count}});
  return values;
}

// As Qwen3-MoE names its tensors; a released checkpoint has the same, and more.
void write_checkpoint(const std::string& path) {
  const ExpertShape shape = {.num_experts = kModel.num_experts, .hidden_size = kModel.hidden_size, .expert_width = kModel.expert_width};
  const std::string gate = gate_source(ModelFamily::qwen3_moe, 0).weight;
  std::vector<TensorPlan> plans = {{gate, Dtype::float32, {kModel.num_experts, kModel.hidden_size}}};
  for (const ExpertTensor tensor : {ExpertTensor::w13, ExpertTensor::w2}) {
    for (const TensorPlan& plan : tensor_plans(expert_source(ModelFamily::qwen3_moe, 0, tensor, shape), Dtype::float32))
      plans.push_back(plan);
  }
  SafetensorsWriter writer(path, plans);
  const std::vector<float> weight = random_values(gate, kModel.num_experts * kModel.hidden_size);
  writer.write(gate, std::as_bytes(std::span(weight)));
  for (const ExpertTensor tensor : {ExpertTensor::w13, ExpertTensor::w2}) {
    const auto elements = ShardMap::whole(expert_shard(tensor, shape, Placement::uniform(kModel.num_experts, 1), 0).local_elements());
    const std::vector<float> full = random_values(std::string(name(tensor)), elements.local_elements());
    save_full(writer, expert_source(ModelFamily::qwen3_moe, 0, tensor, shape), {full.data(), Dtype::float32, {std::ssize(full)}});
  }
  writer.finish();
}

// Layer 0 on `world`, divided ep ways; forward of this rank's tokens.
std::vector<float> run(World& world, const std::string& path, int ep, const std::vector<float>& rows) {
  const ParallelConfig config = solve_parallel({.device_count = world.size(), .ep = ep});
  const auto group = std::make_shared<ExpertGroup>(world, config,
                                                   ExpertGroupOptions{.num_experts = kModel.num_experts,
                                                                      .top_k = kModel.top_k,
                                                                      .hidden_size = kModel.hidden_size,
                                                                      .max_tokens_per_rank = 4 * kTokens,
                                                                      .expert_tp = ExpertTp::gathered});
  const LayerFromCheckpoint loaded = load_layer(Checkpoint::open(path), ModelFamily::qwen3_moe, 0, kModel, group);
  const std::int64_t tokens = std::ssize(rows) / kModel.hidden_size;
  std::vector<float> sums(rows.size());
  const std::int64_t sizes[] = {tokens};
  loaded.layer->warm_up(sizes);
  loaded.layer->forward({rows.data(), Dtype::float32, {tokens, kModel.hidden_size}},
                        {sums.data(), Dtype::float32, {tokens, kModel.hidden_size}}, {.mode = mode_for_step(tokens)});
  return sums;
}

int main() {
  const std::string path = (std::filesystem::temp_directory_path() / "tokenyard_example.safetensors").string();
  write_checkpoint(path);
  const std::int64_t elements = kTokens * kModel.hidden_size;  // of one rank
  const std::vector<float> rows = random_values("rows", 4 * elements);
  std::vector<float> alone;
  run_ranks(1, [&](World& world) { alone = run(world, path, /*ep=*/1, rows); });
  run_ranks(4, [&](World& world) {  // ranks as threads; under `tokenyard launch` World::from_env() makes them processes
    const std::int64_t first = world.rank() * elements;
    const std::vector<float> mine(rows.begin() + first, rows.begin() + first + elements);
    const std::vector<float> sums = run(world, path, /*ep=*/2, mine);
    for (std::int64_t i = 0; i < elements; ++i) {
      if (!(std::abs(sums[i] - alone[first + i]) <= 1e-5F)) throw Error("EP 2 x TP 2 and one rank disagree");
    }
  });
  std::filesystem::remove(path);
  std::cout << "24 tokens through 8 experts on 4 ranks, EP 2 x TP 2, as on one\n";
}
