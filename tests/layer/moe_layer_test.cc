// MoeLayer on ranks against a model in one process: every way to divide it, forward and backward.

#include <gtest/gtest.h>

#include "layer/harness.h"

namespace tokenyard::testing {
namespace {

constexpr ExpertTp kBoth[] = {ExpertTp::virtual_experts, ExpertTp::gathered};

void run_configurations(std::initializer_list<std::pair<int, int>> configurations) {
  std::size_t next = 0;
  for (const auto& [ep, tp] : configurations) {
    for (const ExpertTp expert_tp : kBoth) {
      for (const int micro_batches : {1, 2}) {
        for (const Mode mode : {Mode::throughput, Mode::latency}) {
          run_case({.sizes = {.flavour = kFlavours[next++ % 5]},
                    .ep = ep,
                    .tp = tp,
                    .expert_tp = expert_tp,
                    .mode = mode,
                    .micro_batches = micro_batches});
        }
      }
    }
  }
}

TEST(MoeLayer, UpToFourRanks) { run_configurations({{1, 1}, {2, 1}, {1, 2}, {2, 2}, {4, 1}, {1, 4}}); }

// With 6 experts, two ranks of ep = 8 have none.
TEST(MoeLayer, EightRanks) { run_configurations({{2, 4}, {4, 2}, {8, 1}, {1, 8}}); }

TEST(MoeLayer, EveryKindOfModel) {
  for (const Flavour flavour : kFlavours) {
    for (const ExpertTp expert_tp : kBoth) run_case({.sizes = {.flavour = flavour}, .ep = 2, .tp = 2, .expert_tp = expert_tp});
    run_case({.sizes = {.flavour = flavour}});
  }
}

TEST(MoeLayer, MoreThan32PlacesForARow) {
  const ModelSizes sizes = {.experts = 12, .top_k = 9};
  for (const ExpertTp expert_tp : kBoth) run_case({.sizes = sizes, .ep = 2, .tp = 4, .expert_tp = expert_tp});
}

// The first window has twice the experts of the third; rank 3 has none at all.
TEST(MoeLayer, ReplicasAndUnevenRanks) {
  const Placement placement =
      Placement::custom(4, {{{{0}, 1}, {{2}, 2}}, {{{1}, 1}}, {{{0}, 1}, {{1}, 1}}, {{{2}, 1}}, {{{2}, 1}}, {{{0}, 1}}});
  for (const Flavour flavour : {Flavour::qwen, Flavour::deepseek, Flavour::gpt_oss}) {
    run_case({.sizes = {.flavour = flavour}, .ep = 4, .micro_batches = 2, .placement = placement});
  }
  const Placement windows = Placement::custom(2, {{{{1}, 1}}, {{{0}, 1}}, {{{0}, 1}}, {{{0}, 1}}, {{{1}, 1}}, {{{0}, 1}}});
  run_case({.ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered, .placement = windows});
}

TEST(MoeLayer, OuterReplicasAreIndependent) {
  for (const ExpertTp expert_tp : kBoth) {
    for (const int tp : {1, 2}) run_case({.ep = 2, .tp = tp, .outer_dp = 2, .expert_tp = expert_tp});
  }
  run_case({.ep = 1, .tp = 2, .outer_dp = 2});
  const LayerCase c = {.ep = 2, .outer_dp = 2};
  run_ranks(4, [&](World& world) {
    ExpertGroup group(world, config_of(c), group_options(c));
    EXPECT_EQ(group.world().size(), 2);
    if (world.rank() >= 2) world.barrier();  // the second replica does nothing until the first has finished
    const Model model(c.sizes);
    const RankWeights weights = weights_of(model, group, c);
    std::shared_ptr<ExpertGroup> shared(&group, [](ExpertGroup*) {});
    MoeLayer layer(shared, weights.views(), layer_options(c));
    const Batch batch = batch_of(c, group.world().rank());
    const Tensor x(Dtype::float32, batch.x, {batch.tokens, c.sizes.hidden});
    layer.forward(x.view(), x.view());
    if (world.rank() < 2) world.barrier();
  });
}

TEST(MoeLayer, SharedExpertCutOverRanks) {
  for (const Flavour flavour : {Flavour::deepseek, Flavour::qwen2}) {
    for (const int dense_tp : {2, 4}) {
      run_case({.sizes = {.flavour = flavour}, .ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered, .dense_tp = dense_tp});
      run_case({.sizes = {.flavour = flavour}, .ep = 4, .micro_batches = 2, .dense_tp = dense_tp});
    }
  }
}

TEST(MoeLayer, WithoutAnExchangeOnTheSameTokens) {
  for (const Flavour flavour : kFlavours) {
    for (const int tp : {2, 4}) {
      for (const int dense_tp : {1, tp}) {
        const LayerCase c = {.sizes = {.flavour = flavour}, .tp = tp, .dense_tp = dense_tp, .same_tokens = true};
        run_case(c);
        LayerCase sliced = c;
        sliced.sliced_out = true;
        run_case(sliced);
      }
    }
  }
}

TEST(MoeLayer, HalfPrecision) {
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
    for (const ExpertTp expert_tp : kBoth) {
      run_case({.sizes = {.flavour = Flavour::deepseek}, .ep = 2, .tp = 2, .expert_tp = expert_tp, .dtype = dtype, .tolerance = 2e-2});
    }
  }
}

}  // namespace
}  // namespace tokenyard::testing
