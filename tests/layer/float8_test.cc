// Layers of float8 experts give, bit for bit, what the same numbers give in float32, and that is the model's answer.

#include <gtest/gtest.h>

#include "layer/harness.h"
#include "unit/expect_usage_error.h"

namespace tokenyard::testing {
namespace {

// Three blocks across a row of w13, of which one is short; shards are of one block or two.
const ModelSizes kSizes = {.flavour = Flavour::deepseek, .hidden = 272, .width = 256, .float8 = true};

void expect_answer(const LayerCase& c) {
  SCOPED_TRACE(c.describe());
  run_ranks(c.ep * c.tp, [&](World& world) {
    const Model model(c.sizes);
    const auto group = std::make_shared<ExpertGroup>(world, config_of(c), group_options(c));
    LayerCase wide = c;
    wide.sizes.float8 = false;
    wide.dtype = Dtype::float32;  // of weights
    const RankWeights weights = weights_of(model, *group, c);
    RankWeights widened = weights_of(model, *group, wide);
    MoeWeights of_float32 = weights.views();
    of_float32.experts = widened.views().experts;
    MoeLayer layer(group, weights.views(), layer_options(c)), same(group, of_float32, layer_options(c));
    const Batch batch = batch_of(c, group->world().rank());
    const Tensor x(c.dtype, batch.x, {batch.tokens, c.sizes.hidden});
    const Tensor out = Tensor::zeros(c.dtype, {batch.tokens, c.sizes.hidden}),
                 expected = Tensor::zeros(c.dtype, {batch.tokens, c.sizes.hidden});
    for (const Mode mode : {Mode::throughput, Mode::latency}) {
      layer.forward(x.view(), out.view(), {.mode = mode});
      same.forward(x.view(), expected.view(), {.mode = mode});
      EXPECT_EQ(out.values(), expected.values());
      expect_close("out", out.values(), outputs_of(model, batch, c.sizes.hidden), c.tolerance);
    }
  });
}

TEST(Float8Layer, GivesTheAnswerOfItsNumbers) {
  for (const auto& [ep, tp] : {std::pair{1, 1}, {2, 1}, {4, 1}, {1, 2}, {2, 2}}) {
    for (const ExpertTp expert_tp : {ExpertTp::virtual_experts, ExpertTp::gathered})
      expect_answer({.sizes = kSizes, .ep = ep, .tp = tp, .expert_tp = expert_tp});
  }
  expect_answer({.sizes = kSizes, .tp = 2, .same_tokens = true});
  expect_answer({.sizes = kSizes, .ep = 2, .dense_tp = 2});
  expect_answer({.sizes = kSizes, .ep = 2, .dtype = Dtype::bfloat16, .tolerance = 2e-2});
}

// A rank that asks for what float8 has not is refused, its peers learn why, and the next step is fine.
TEST(Float8Layer, GoesForwardOnly) {
  const LayerCase c = {.sizes = kSizes, .ep = 2};
  run_ranks(2, [&](World& world) {
    const Model model(c.sizes);
    const auto group = std::make_shared<ExpertGroup>(world, config_of(c), group_options(c));
    const RankWeights weights = weights_of(model, *group, c);
    MoeLayer layer(group, weights.views(), layer_options(c));
    const Batch batch = batch_of(c, world.rank());
    const Tensor x(c.dtype, batch.x, {batch.tokens, c.sizes.hidden}), out = Tensor::zeros(c.dtype, {batch.tokens, c.sizes.hidden});
    MoeActivations saved;
    const auto expect_refusal = [&](const std::function<void()>& wrong) {
      if (world.rank() == 0) {
        expect_usage_error(wrong, {"float8_e4m3 goes forward only", "widen the weights"});
      } else {
        try {
          layer.forward(x.view(), out.view());
          ADD_FAILURE() << "rank 1 went on";
        } catch (const TransportError& error) {
          EXPECT_EQ(error.failure().kind, FailureKind::aborted) << error.what();
          EXPECT_NE(std::string(error.what()).find("float8_e4m3 goes forward only"), std::string::npos) << error.what();
        }
      }
      layer.forward(x.view(), out.view());
      expect_close("out", out.values(), outputs_of(model, batch, c.sizes.hidden), c.tolerance);
    };
    expect_refusal([&] { layer.forward(x.view(), out.view(), {}, &saved); });
    expect_refusal([&] { layer.backward({.x = x.view(), .d_out = x.view()}, saved, out.view(), {}); });
  });
}

TEST(Float8Layer, SaysWhichWeightsDoNotFit) {
  const LayerCase c = {.sizes = kSizes};
  run_ranks(1, [&](World& world) {
    const Model model(c.sizes);
    const auto group = std::make_shared<ExpertGroup>(world, config_of(c), group_options(c));
    const MoeWeights weights = weights_of(model, *group, c).views();
    MoeWeights wrong = weights;
    wrong.experts.w13.shape[2] = 64;  // of a cut through blocks
    expect_usage_error([&] { MoeLayer(group, wrong, layer_options(c)); },
                       {"[6, 2, 64, 272] float8_e4m3", "multiple of 128", "fewer shards"});
    wrong = weights;
    wrong.experts.w2_scale = {};
    expect_usage_error([&] { MoeLayer(group, wrong, layer_options(c)); }, {"w2_scale is absent", "[6, 3, 2] float32"});
    wrong = weights;
    wrong.shared.weights = {weights.experts.w13, weights.experts.w2};
    wrong.shared.weights.w13.shape[0] = 1;
    expect_usage_error([&] { MoeLayer(group, wrong, layer_options(c)); },
                       {"feed-forward of all tokens", "float8_e4m3", "widen the weights"});
  });
}

}  // namespace
}  // namespace tokenyard::testing
