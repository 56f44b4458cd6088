// DenseLayer: a feed-forward of all tokens, on whole weights and cut over ranks.

#include <gtest/gtest.h>

#include "layer/harness.h"

namespace tokenyard::testing {
namespace {

// A model whose experts say nothing, so that the shared one is all there is.
Model dense_model(const LayerCase& c) {
  Model model(c.sizes);
  for (double& value : model.parameters().experts.w2) value = 0;
  return model;
}

void expect_dense_answer(World& world, const LayerCase& c) {
  const Model model = dense_model(c);
  auto group = std::make_shared<ExpertGroup>(world, config_of(c), group_options(c));
  const RankWeights weights = weights_of(model, *group, c);
  DenseLayer layer(group, weights.views().shared);
  const Batch batch = batch_of(c, world.rank());
  const std::int64_t hidden = c.sizes.hidden;
  const Tensor x(c.dtype, batch.x, {batch.tokens, hidden});
  const Tensor d_out(c.dtype, batch.d_out, {batch.tokens, hidden});
  const Tensor out = Tensor::zeros(c.dtype, {batch.tokens, hidden});
  const Tensor d_x = Tensor::zeros(c.dtype, {batch.tokens, hidden});
  DenseActivations saved;
  layer.forward(x.view(), out.view(), &saved);
  const RankGradients gradients(weights);
  layer.backward(x.view(), d_out.view(), saved, d_x.view(), gradients.views().shared);
  Parameters d = model.zeros(), sums = model.zeros();
  gradients.add_to(d, weights, *group);

  Values expected, expected_d_x(batch.x.size());
  for (int rank = 0; rank < world.size(); ++rank) {
    const Batch of_rank = batch_of(c, rank);
    Values d_rows(of_rank.x.size());
    for (std::int64_t t = 0; t < of_rank.tokens; ++t) {
      model.backward(&of_rank.x[t * hidden], &of_rank.d_out[t * hidden], &d_rows[t * hidden], sums);
      const Values row = model.forward(&of_rank.x[t * hidden]);
      if (rank == world.rank()) expected.insert(expected.end(), row.begin(), row.end());
    }
    if (rank == world.rank()) expected_d_x = d_rows;
  }
  expect_close("out", out.values(), expected, c.tolerance);
  expect_close("d_x", d_x.values(), expected_d_x, c.tolerance);
  expect_close("w13", sum_over_ranks(world, d.shared.w13), sums.shared.w13, c.tolerance);
  expect_close("w2", sum_over_ranks(world, d.shared.w2), sums.shared.w2, c.tolerance);
  expect_close("gate", sum_over_ranks(world, d.shared_gate), sums.shared_gate, c.tolerance);

  layer.forward(x.view(), x.view());  // in place
  EXPECT_EQ(x.values(), out.values());
}

TEST(DenseLayer, WholeAndCutOverRanks) {
  for (const Flavour flavour : {Flavour::deepseek, Flavour::qwen2}) {
    for (const int dense_tp : {1, 2, 4}) {
      const LayerCase c = {.sizes = {.flavour = flavour}, .ep = 4, .dense_tp = dense_tp};
      SCOPED_TRACE(c.describe());
      run_ranks(4, [&](World& world) { expect_dense_answer(world, c); });
    }
  }
}

TEST(DenseLayer, NeedsNoGroupWithWholeWeights) {
  const LayerCase c = {.sizes = {.flavour = Flavour::deepseek}};
  const Model model = dense_model(c);
  const FeedForward& f = model.parameters().shared;
  const Tensor w13(Dtype::float32, f.w13, {1, 2, f.width, f.hidden}), w2(Dtype::float32, f.w2, {1, f.hidden, f.width});
  DenseLayer layer(nullptr, {.weights = {.w13 = w13.view(), .w2 = w2.view()}});
  const Batch batch = batch_of(c, 0);
  const Tensor x(Dtype::float32, batch.x, {batch.tokens, f.hidden});
  const Tensor out = Tensor::zeros(Dtype::float32, {batch.tokens, f.hidden});
  layer.forward(x.view(), out.view());
  Values expected;
  for (std::int64_t t = 0; t < batch.tokens; ++t) {
    const Values row = model.forward(&batch.x[t * f.hidden]);
    expected.insert(expected.end(), row.begin(), row.end());
  }
  expect_close("out", out.values(), expected, c.tolerance);
}

}  // namespace
}  // namespace tokenyard::testing
