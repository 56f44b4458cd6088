// Gradients of a layer on GPUs are those of the model in one process: of rows, gate, experts, shared expert and its sigmoid, for every gate
// and activation, in both modes, with several micro-batches under way.

#include <gtest/gtest.h>

#include "device/layer_side.h"

namespace tokenyard::device_test {
namespace {

using testing::Flavour;
using testing::kFlavours;
using testing::Parameters;
using testing::RankGradients;

class DeviceLayerBackward : public OnGpu {};

// Gradients in device memory, zero at first.
class GradientsOnDevice {
 public:
  GradientsOnDevice(OnDevice& device, const RankWeights& weights) : host_(weights) {
    const MoeGradients from = host_.views();
    const auto feed_forward = [&](const ExpertGradients& of) {
      return ExpertGradients{device.copy(of.w13), device.copy(of.w2), device.copy(of.w13_bias), device.copy(of.w2_bias)};
    };
    there_ = {.gate_weight = device.copy(from.gate_weight),
              .gate_bias = device.copy(from.gate_bias),
              .experts = feed_forward(from.experts),
              .shared = {feed_forward(from.shared.weights), device.copy(from.shared.gate)}};
  }
  const MoeGradients& views() const { return there_; }
  void add_to(Parameters& full, const RankWeights& weights, const ExpertGroup& group) const {
    const MoeGradients to = host_.views();
    OnDevice::read(to.gate_weight, there_.gate_weight);
    OnDevice::read(to.gate_bias, there_.gate_bias);
    for (const auto& [host, device] : {std::pair{&to.experts, &there_.experts}, {&to.shared.weights, &there_.shared.weights}}) {
      OnDevice::read(host->w13, device->w13);
      OnDevice::read(host->w2, device->w2);
      OnDevice::read(host->w13_bias, device->w13_bias);
      OnDevice::read(host->w2_bias, device->w2_bias);
    }
    OnDevice::read(to.shared.gate, there_.shared.gate);
    host_.add_to(full, weights, group);
  }

 private:
  RankGradients host_;
  MoeGradients there_;
};

void expect_sums(const World& world, const Parameters& mine, const Parameters& expected, double tolerance) {
  const auto expect = [&](const char* what, const Values& found, const Values& wanted) {
    testing::expect_close(what, testing::sum_over_ranks(world, found), wanted, tolerance);
  };
  expect("d gate", mine.gate, expected.gate);
  expect("d gate_bias", mine.gate_bias, expected.gate_bias);
  expect("d w13", mine.experts.w13, expected.experts.w13);
  expect("d w2", mine.experts.w2, expected.experts.w2);
  expect("d w13_bias", mine.experts.w13_bias, expected.experts.w13_bias);
  expect("d w2_bias", mine.experts.w2_bias, expected.experts.w2_bias);
  expect("d shared w13", mine.shared.w13, expected.shared.w13);
  expect("d shared w2", mine.shared.w2, expected.shared.w2);
  expect("d shared gate", mine.shared_gate, expected.shared_gate);
}

// What the model in one process has after two micro-batches of the same rows of all ranks.
void expect_model(const LayerRank& rank, Values& expected_d_x, Parameters& expected) {
  const std::int64_t hidden = rank.c.sizes.hidden;
  for (int r = 0; r < (rank.c.same_tokens ? 1 : rank.group->world().size()); ++r) {
    const Batch batch = batch_of(rank.c, r);
    const bool is_mine = rank.c.same_tokens || r == rank.group->world().rank();
    for (std::int64_t t = 0; t < 2 * batch.tokens; ++t) {
      Values d_row(static_cast<std::size_t>(hidden));
      const std::int64_t at = t % std::max<std::int64_t>(batch.tokens, 1) * hidden;
      rank.model.backward(&batch.x[at], &batch.d_out[at], d_row.data(), expected);
      if (is_mine && t < batch.tokens) expected_d_x.insert(expected_d_x.end(), d_row.begin(), d_row.end());
    }
  }
}

// Two micro-batches of the same rows, the second in latency mode: both under way, then backward in the other order. Gradients add up.
void expect_gradients(const LayerCase& of) {
  LayerCase c = of;
  c.tolerance = c.dtype == Dtype::float32 ? 2e-5 : 2e-2;
  const auto steps = [](LayerRank& rank) {
    const std::int64_t hidden = rank.c.sizes.hidden, tokens = rank.batch.tokens;
    const TensorView d_out = rank.device.copy(Tensor(rank.c.dtype, rank.own_part(rank.batch.d_out), {rank.own.count, hidden}).view());
    const TensorView d_x = rank.device.copy(Tensor::zeros(rank.c.dtype, {tokens, hidden}).view());
    const GradientsOnDevice gradients(rank.device, rank.weights);
    MoeActivations first, second;
    rank.group->world().barrier();
    rank.layer.forward(rank.x, rank.out, rank.options(Mode::throughput), &first);
    rank.layer.forward(rank.x, rank.out, rank.options(Mode::latency), &second);
    rank.expect_answer("out");
    Values expected_d_x;
    Parameters expected = rank.model.zeros(), found = rank.model.zeros();
    expect_model(rank, expected_d_x, expected);
    for (const auto& [saved, mode] : {std::pair{&second, Mode::latency}, {&first, Mode::throughput}}) {
      rank.layer.backward({.x = rank.x, .d_out = d_out, .options = rank.options(mode)}, *saved, d_x, gradients.views());
      testing::expect_close("d x", rank.fetch(d_x), expected_d_x, rank.c.tolerance);
    }
    gradients.add_to(found, rank.weights, *rank.group);
    const World& world = rank.group->world();
    expect_sums(world, found, expected, rank.c.tolerance);
    cuda_check(cudaStreamSynchronize(rank.stream.get()), "cudaStreamSynchronize");
    world.barrier();
  };
  on_layer_ranks(c, steps, [](ExpertGroupOptions& options) {
    options.gradients = true;
    options.timeout_ms = 10'000;
  });
}

TEST_F(DeviceLayerBackward, EveryGateAndActivation) {
  for (const Flavour flavour : kFlavours) {
    for (const int ep : {1, 2, 4}) expect_gradients({.sizes = {.flavour = flavour}, .ep = ep});
  }
}

TEST_F(DeviceLayerBackward, HalfPrecision) {
  for (const Flavour flavour : {Flavour::deepseek, Flavour::qwen2}) {
    for (const int ep : {1, 2}) expect_gradients({.sizes = {.flavour = flavour}, .ep = ep, .dtype = Dtype::bfloat16});
  }
}

TEST_F(DeviceLayerBackward, VirtualShardsAndReplicas) {
  expect_gradients({.sizes = {.flavour = Flavour::gpt_oss}, .ep = 2, .tp = 2});
  const Placement placement =
      Placement::custom(4, {{{{0}, 1}, {{2}, 2}}, {{{1}, 1}}, {{{0}, 1}, {{1}, 1}}, {{{2}, 1}}, {{{2}, 1}}, {{{0}, 1}}});
  expect_gradients({.sizes = {.flavour = Flavour::deepseek}, .ep = 4, .placement = placement});
}

TEST_F(DeviceLayerBackward, GatheredShards) {
  for (const auto& [ep, tp] : {std::pair{2, 2}, {1, 2}, {1, 4}, {4, 1}}) {
    for (const Flavour flavour : {Flavour::deepseek, Flavour::gpt_oss, Flavour::qwen2})
      expect_gradients({.sizes = {.flavour = flavour}, .ep = ep, .tp = tp, .expert_tp = ExpertTp::gathered});
  }
  for (const int ep : {1, 2}) {
    expect_gradients({.sizes = {.flavour = Flavour::qwen2},
                      .ep = ep,
                      .tp = 2,
                      .expert_tp = ExpertTp::gathered,
                      .dtype = Dtype::bfloat16,
                      .dense_tp = 2});
  }
  const Placement one = Placement::custom(2, {{{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}});
  expect_gradients({.ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered, .placement = one});
  expect_gradients({.tp = 2, .outer_dp = 2});
}

TEST_F(DeviceLayerBackward, ShardsOfTheSameTokens) {
  for (const bool sliced_out : {false, true}) {
    for (const int tp : {2, 4}) {
      for (const Flavour flavour : {Flavour::deepseek, Flavour::gpt_oss})
        expect_gradients({.sizes = {.flavour = flavour}, .tp = tp, .same_tokens = true, .sliced_out = sliced_out});
    }
    expect_gradients({.sizes = {.flavour = Flavour::qwen2}, .tp = 4, .dense_tp = 2, .same_tokens = true, .sliced_out = sliced_out});
  }
}

TEST_F(DeviceLayerBackward, ASharedExpertCutOverRanks) {
  for (const Flavour flavour : {Flavour::deepseek, Flavour::qwen2})
    expect_gradients({.sizes = {.flavour = flavour}, .ep = 4, .dense_tp = 2});
}

// A DenseLayer is the shared expert alone.
void expect_dense_gradients(const LayerCase& of) {
  LayerCase c = of;
  c.tolerance = c.dtype == Dtype::float32 ? 2e-5 : 2e-2;
  const auto steps = [](LayerRank& rank) {
    const std::int64_t hidden = rank.c.sizes.hidden, tokens = rank.batch.tokens;
    Model model = rank.model;
    for (double& value : model.parameters().experts.w2) value = 0;
    const TensorView d_out = rank.device.copy(Tensor(rank.c.dtype, rank.batch.d_out, {tokens, hidden}).view());
    const TensorView d_x = rank.device.copy(Tensor::zeros(rank.c.dtype, {tokens, hidden}).view());
    const GradientsOnDevice gradients(rank.device, rank.weights);
    DenseLayer layer(rank.group, rank.device.copy(rank.weights.views()).shared);
    DenseActivations saved;
    const World& world = rank.group->world();
    world.barrier();
    void* const stream = rank.stream.get();
    layer.forward(rank.x, rank.out, &saved, stream);
    layer.backward(rank.x, d_out, saved, d_x, gradients.views().shared, stream);
    testing::expect_close("out", rank.fetch(rank.out), testing::outputs_of(model, rank.batch, hidden), rank.c.tolerance);
    Parameters expected = model.zeros(), found = model.zeros();
    Values expected_d_x;
    for (int r = 0; r < world.size(); ++r) {
      const Batch batch = batch_of(rank.c, r);
      Values d_rows(batch.x.size());
      for (std::int64_t t = 0; t < batch.tokens; ++t)
        model.backward(&batch.x[t * hidden], &batch.d_out[t * hidden], &d_rows[t * hidden], expected);
      if (r == world.rank()) expected_d_x = d_rows;
    }
    testing::expect_close("d x", rank.fetch(d_x), expected_d_x, rank.c.tolerance);
    gradients.add_to(found, rank.weights, *rank.group);
    const auto expect = [&](const char* what, const Values& mine, const Values& wanted) {
      testing::expect_close(what, testing::sum_over_ranks(world, mine), wanted, rank.c.tolerance);
    };
    expect("d w13", found.shared.w13, expected.shared.w13);
    expect("d w2", found.shared.w2, expected.shared.w2);
    expect("d gate", found.shared_gate, expected.shared_gate);
    layer.forward(rank.x, rank.x, nullptr, stream);  // in place
    testing::expect_close("out over x", rank.fetch(rank.x), testing::outputs_of(model, rank.batch, hidden), rank.c.tolerance);
    world.barrier();
  };
  on_layer_ranks(c, steps, [](ExpertGroupOptions& options) { options.gradients = true; });
}

TEST_F(DeviceLayerBackward, DenseLayersWholeAndCutOverRanks) {
  for (const Flavour flavour : {Flavour::deepseek, Flavour::qwen2}) {
    for (const int dense_tp : {1, 2, 4}) expect_dense_gradients({.sizes = {.flavour = flavour}, .ep = 4, .dense_tp = dense_tp});
  }
  expect_dense_gradients({.sizes = {.flavour = Flavour::qwen2}, .ep = 2, .dtype = Dtype::bfloat16, .dense_tp = 2});
}

TEST_F(DeviceLayerBackward, GradientsOfLossesOnTheLogitsGoIn) {
  const auto steps = [](LayerRank& rank) {
    const std::int64_t tokens = rank.batch.tokens, hidden = rank.c.sizes.hidden, experts = rank.c.sizes.experts;
    const Values d_logits = testing::drawn("d_logits", tokens * experts, 1);
    const TensorView d = rank.device.copy(Tensor(Dtype::float32, d_logits, {tokens, experts}).view());
    const TensorView nothing = rank.device.copy(Tensor::zeros(Dtype::float32, {tokens, hidden}).view());
    const TensorView d_x = rank.device.copy(Tensor::zeros(Dtype::float32, {tokens, hidden}).view());
    const GradientsOnDevice gradients(rank.device, rank.weights);
    MoeActivations saved;
    const MoeStepOptions options = rank.options(Mode::throughput);
    rank.group->world().barrier();
    rank.layer.forward(rank.x, rank.out, options, &saved);
    rank.layer.backward({.x = rank.x, .d_out = nothing, .d_logits = d, .options = options}, saved, d_x, gradients.views());
    Values expected(rank.batch.x.size());
    for (std::int64_t i = 0; i < tokens * hidden; ++i) {
      for (std::int64_t e = 0; e < experts; ++e)
        expected[i] += d_logits[i / hidden * experts + e] * rank.model.parameters().gate[e * hidden + i % hidden];
    }
    testing::expect_close("d x", rank.fetch(d_x), expected, 2e-5);
    rank.group->world().barrier();
  };
  on_layer_ranks({.ep = 2}, steps, [](ExpertGroupOptions& options) { options.gradients = true; });
}

}  // namespace
}  // namespace tokenyard::device_test
