// What one step of MoeLayer promises beside its sums: what it may and may not touch, modes, replay, masks, warm-up, one exchange for
// all layers, and words for what does not fit.

#include <gtest/gtest.h>

#include <functional>

#include "layer/harness.h"

namespace tokenyard::testing {
namespace {

struct OnRank {
  LayerCase c;
  Model model;
  std::shared_ptr<ExpertGroup> group;
  RankWeights weights;
  Batch batch;
  Tensor x;
  MoeLayer layer;

  OnRank(World& world, const LayerCase& of)
      : c(of),
        model(of.sizes),
        group(std::make_shared<ExpertGroup>(world, config_of(of), group_options(of))),
        weights(weights_of(model, *group, of)),
        batch(batch_of(of, world.rank())),
        x(of.dtype, batch.x, {batch.tokens, of.sizes.hidden}),
        layer(group, weights.views(), layer_options(of)) {}
  Tensor zeros() const { return Tensor::zeros(c.dtype, {batch.tokens, c.sizes.hidden}); }
  Values expected() const { return outputs_of(model, batch, c.sizes.hidden); }
};

const LayerCase kShared = {.sizes = {.flavour = Flavour::deepseek}, .ep = 4};

void on_ranks(const LayerCase& c, const std::function<void(OnRank&)>& fn) {
  SCOPED_TRACE(c.describe());
  run_ranks(c.ep * c.tp, [&](World& world) {
    OnRank rank(world, c);
    fn(rank);
  });
}

TEST(MoeStep, WritesOverItsInputWhenAskedTo) {
  for (const LayerCase& c : {kShared, LayerCase{.sizes = kShared.sizes}, LayerCase{.sizes = kShared.sizes, .tp = 2}}) {
    on_ranks(c, [](OnRank& rank) {
      rank.layer.forward(rank.x.view(), rank.x.view());
      expect_close("out", rank.x.values(), rank.expected(), 2e-5);
    });
  }
}

// The shared expert still reads the input when rows have arrived.
TEST(MoeStep, ReceivedRowsAreNotTheInput) {
  on_ranks(kShared, [](OnRank& rank) {
    MoeActivations saved;
    const Tensor out = rank.zeros();
    rank.layer.forward(rank.x.view(), out.view(), {}, &saved);
    const TensorView rows = saved.received().rows();
    const auto* begin = static_cast<const std::byte*>(rows.data);
    const auto* input = static_cast<const std::byte*>(rank.x.view().data);
    const std::int64_t bytes = rank.batch.tokens * rank.c.sizes.hidden * 4;
    EXPECT_TRUE(begin + rows.num_elements() * 4 <= input || input + bytes <= begin);
    EXPECT_EQ(saved.routing().num_tokens(), rank.batch.tokens);
    EXPECT_EQ(saved.logits().shape[1], rank.c.sizes.experts);
  });
}

TEST(MoeStep, ModesAndMicroBatchesUnderWayAtOnce) {
  on_ranks(kShared, [](OnRank& rank) {
    const Tensor d_out(Dtype::float32, rank.batch.d_out, {rank.batch.tokens, rank.c.sizes.hidden});
    std::vector<Tensor> d_x;
    MoeActivations first, second, third;
    const Tensor out = rank.zeros();
    for (MoeActivations* saved : {&first, &second, &third}) {
      rank.layer.forward(rank.x.view(), out.view(), {.mode = saved == &second ? Mode::latency : Mode::throughput}, saved);
    }
    for (MoeActivations* saved : {&third, &first, &second}) {
      d_x.push_back(rank.zeros());
      const RankGradients gradients(rank.weights);
      rank.layer.backward({.x = rank.x.view(), .d_out = d_out.view()}, *saved, d_x.back().view(), gradients.views());
    }
    EXPECT_EQ(d_x[0].values(), d_x[1].values());
    EXPECT_EQ(d_x[0].values(), d_x[2].values());
  });
}

TEST(MoeStep, ReplaysAndMasks) {
  on_ranks({.ep = 2}, [](OnRank& rank) {
    const std::int64_t tokens = rank.batch.tokens;
    Replay replay = replay_of(rank.model, rank.batch, rank.c.sizes.hidden);
    const Tensor out = rank.zeros();
    rank.layer.forward(rank.x.view(), out.view(),
                       {.mask = {replay.mask.data(), Dtype::uint8, {tokens}}, .given_ids = {replay.ids.data(), Dtype::int64, {tokens, 3}}});
    expect_close("out", out.values(), replay.outputs, 2e-5);
  });
}

TEST(MoeStep, GradientsOfLossesOnTheLogitsGoIn) {
  on_ranks({.ep = 2}, [](OnRank& rank) {
    const std::int64_t tokens = rank.batch.tokens, hidden = rank.c.sizes.hidden, experts = rank.c.sizes.experts;
    const Values d_logits = drawn("d_logits", tokens * experts, 1);
    const Tensor d(Dtype::float32, d_logits, {tokens, experts});
    const Tensor out = rank.zeros(), nothing = rank.zeros(), d_x = rank.zeros();
    MoeActivations saved;
    rank.layer.forward(rank.x.view(), out.view(), {}, &saved);
    const RankGradients gradients(rank.weights);
    rank.layer.backward({.x = rank.x.view(), .d_out = nothing.view(), .d_logits = d.view()}, saved, d_x.view(), gradients.views());
    Values expected(rank.batch.x.size());
    for (std::int64_t i = 0; i < tokens * hidden; ++i) {
      for (std::int64_t e = 0; e < experts; ++e)
        expected[i] += d_logits[i / hidden * experts + e] * rank.model.parameters().gate[e * hidden + i % hidden];
    }
    expect_close("d_x", d_x.values(), expected, 2e-5);
  });
}

TEST(MoeStep, LeavesTheLogitsOfItsChoiceWhereAsked) {
  on_ranks(kShared, [](OnRank& rank) {
    const std::int64_t tokens = rank.batch.tokens, hidden = rank.c.sizes.hidden, experts = rank.c.sizes.experts;
    const Tensor logits = Tensor::zeros(Dtype::float32, {tokens, experts}), out = rank.zeros();
    rank.layer.forward(rank.x.view(), out.view(), {.logits = logits.view()});
    Values expected;
    for (std::int64_t i = 0; i < tokens * experts; ++i) {
      double sum = 0;
      for (std::int64_t h = 0; h < hidden; ++h)
        sum += rank.batch.x[i / experts * hidden + h] * rank.model.parameters().gate[i % experts * hidden + h];
      expected.push_back(sum);
    }
    expect_close("logits", logits.values(), expected, 1e-5);
  });
}

TEST(MoeStep, OneExchangeServesAllLayers) {
  on_ranks(kShared, [](OnRank& rank) {
    LayerCase other = {.sizes = {.flavour = Flavour::qwen}, .ep = 4};
    other.placement = Placement::custom(4, {{{{3}, 1}}, {{{2}, 1}}, {{{2}, 1}}, {{{1}, 1}}, {{{0}, 1}}, {{{3}, 1}}});
    const Model model(other.sizes, 2);
    const RankWeights weights = weights_of(model, *rank.group, other);
    MoeLayer second(rank.group, weights.views(), layer_options(other));
    MoeLayer third(rank.group, rank.weights.views(), layer_options(rank.c));
    const Tensor middle = rank.zeros(), out = rank.zeros(), again = rank.zeros();
    rank.layer.forward(rank.x.view(), middle.view());
    second.forward(middle.view(), out.view(), {.mode = Mode::latency});
    third.forward(rank.x.view(), again.view());
    Values expected;
    for (std::int64_t t = 0; t < rank.batch.tokens; ++t) {
      const Values row = model.forward(rank.model.forward(&rank.batch.x[t * rank.c.sizes.hidden]).data());
      expected.insert(expected.end(), row.begin(), row.end());
    }
    expect_close("out", out.values(), expected, 5e-5);
    EXPECT_EQ(again.values(), middle.values());
  });
}

TEST(MoeStep, WarmUpRunsEverySize) {
  const std::int64_t counts[] = {0, 1, 5, 9};
  for (LayerCase c : {kShared, LayerCase{.ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered}, LayerCase{.tp = 2, .same_tokens = true}}) {
    on_ranks(c, [&](OnRank& rank) {
      rank.layer.warm_up(counts);
      const Tensor out = rank.zeros();
      rank.layer.forward(rank.x.view(), out.view());
      expect_close("out", out.values(), rank.expected(), 2e-5);
      const std::int64_t too_many[] = {10};
      EXPECT_THROW(rank.layer.warm_up(too_many), UsageError);
    });
  }
}

TEST(MoeStep, ModeFollowsTheLargestRank) {
  EXPECT_EQ(mode_for_step(128), Mode::latency);
  EXPECT_EQ(mode_for_step(129), Mode::throughput);
  EXPECT_EQ(mode_for_step(129, 256), Mode::latency);
  EXPECT_EQ(mode_for_step(0, 0), Mode::latency);
}

TEST(MoeStep, NotesItsPhases) {
  run_ranks(2, [](World& world) {
    LayerCase c = {.sizes = {.flavour = Flavour::deepseek}, .ep = 2};
    ExpertGroupOptions options = group_options(c);
    options.trace = true;
    auto group = std::make_shared<ExpertGroup>(world, config_of(c), options);
    const Model model(c.sizes);
    const RankWeights weights = weights_of(model, *group, c);
    MoeLayer layer(group, weights.views(), layer_options(c));
    const Batch batch = batch_of(c, world.rank());
    const Tensor x(c.dtype, batch.x, {batch.tokens, c.sizes.hidden});
    layer.forward(x.view(), x.view());
    std::vector<std::string> phases;
    for (const PhaseSpan& span : group->take_spans()) {
      phases.push_back(span.phase);
      EXPECT_LE(span.begin_ns, span.end_ns);
    }
    EXPECT_EQ(phases, (std::vector<std::string>{"route", "shared", "dispatch", "experts", "combine"}));
    EXPECT_TRUE(group->take_spans().empty());
  });
}

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const UsageError& error) {
    return error.what();
  }
  return "nothing was refused";
}

// One rank's wrong argument fails the step on all ranks, at once and with its reason; the next one is fine.
TEST(MoeStep, ARefusedStepIsNotAHang) {
  for (const LayerCase& c : {kShared, LayerCase{.sizes = kShared.sizes, .ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered},
                             LayerCase{.sizes = kShared.sizes, .ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered, .dense_tp = 2},
                             LayerCase{.sizes = kShared.sizes, .ep = 4, .dense_tp = 2}, LayerCase{.sizes = kShared.sizes, .tp = 4},
                             LayerCase{.sizes = kShared.sizes, .tp = 4, .dense_tp = 4, .same_tokens = true}}) {
    on_ranks(c, [](OnRank& rank) {
      const bool is_wrong = rank.group->world().rank() == 2;
      const Tensor out = rank.zeros(), halves = Tensor::zeros(Dtype::bfloat16, {rank.batch.tokens, rank.c.sizes.hidden});
      const auto expect_failure = [&](const std::function<void()>& step, const char* reason) {
        try {
          step();
          ADD_FAILURE() << "rank " << rank.group->world().rank() << " went on";
        } catch (const UsageError& error) {
          EXPECT_TRUE(is_wrong) << error.what();
        } catch (const TransportError& error) {
          EXPECT_FALSE(is_wrong) << error.what();
          EXPECT_EQ(error.failure().kind, FailureKind::aborted) << error.what();
          EXPECT_NE(std::string(error.what()).find(reason), std::string::npos) << error.what();
        }
      };
      MoeActivations saved;
      expect_failure([&] { rank.layer.forward(rank.x.view(), is_wrong ? halves.view() : out.view()); }, "use one dtype");
      rank.layer.forward(rank.x.view(), out.view(), {}, &saved);
      expect_close("out", out.values(), rank.expected(), 2e-5);
      const Tensor d_x = rank.zeros();
      const RankGradients gradients(rank.weights);
      MoeGradients views = gradients.views();
      if (is_wrong) views.experts.w2 = {};
      expect_failure([&] { rank.layer.backward({.x = rank.x.view(), .d_out = out.view()}, saved, d_x.view(), views); }, "gradient of w2");
      rank.layer.backward({.x = rank.x.view(), .d_out = out.view()}, saved, d_x.view(), gradients.views());
    });
  }
}

// Ranks 0 and 2 are one exchange, with more rows than it holds; 1 and 3 another, with few. A window's ranks stop together.
TEST(MoeStep, AnOverflowOfOneExchangeEndsTheStepOnAll) {
  run_ranks(4, [](World& world) {
    const LayerCase c = {.ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered};
    ExpertGroupOptions options = group_options(c);
    options.receive_rows = 4;
    const auto group = std::make_shared<ExpertGroup>(world, config_of(c), options);
    const Model model(c.sizes);
    const RankWeights weights = weights_of(model, *group, c);
    MoeLayer layer(group, weights.views(), layer_options(c));
    const Batch batch = batch_of(c, world.rank());
    const Tensor x(c.dtype, batch.x, {batch.tokens, c.sizes.hidden});
    const Tensor out = Tensor::zeros(c.dtype, {batch.tokens, c.sizes.hidden});
    try {
      layer.forward(x.view(), out.view());
      ADD_FAILURE() << "rank " << world.rank() << " went on";
    } catch (const TransportError& error) {
      EXPECT_EQ(error.failure().kind, world.rank() % 2 == 0 ? FailureKind::overflow : FailureKind::aborted) << error.what();
    }
    if (world.rank() % 2 == 0) group->exchange()->clear();
    const Values one_row = drawn("one row", c.sizes.hidden, 1);
    const Tensor one(c.dtype, one_row, {1, c.sizes.hidden});
    layer.forward(one.view(), one.view());
    expect_close("out", one.values(), model.forward(one_row.data()), 2e-5);
  });
}

TEST(MoeStep, RowsMayBeStrided) {
  for (const LayerCase& c : {kShared, LayerCase{.sizes = kShared.sizes, .ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered, .dense_tp = 2},
                             LayerCase{.sizes = kShared.sizes, .tp = 2, .dense_tp = 2, .same_tokens = true}}) {
    on_ranks(c, [](OnRank& rank) {
      const std::int64_t tokens = rank.batch.tokens, hidden = rank.c.sizes.hidden;
      const auto strided = [&](const Values& rows) {
        Values wide;
        for (std::int64_t t = 0; t < tokens; ++t) {
          wide.insert(wide.end(), rows.begin() + t * hidden, rows.begin() + (t + 1) * hidden);
          wide.insert(wide.end(), 4, 1e30);
        }
        return Tensor(Dtype::float32, wide, {tokens, hidden + 4});
      };
      const auto rows_of = [&](const Tensor& wide) {
        TensorView view = wide.view();
        view.shape[1] = hidden;
        return view;
      };
      const auto values_of = [&](const Tensor& wide) {
        Values values;
        for (std::int64_t t = 0; t < tokens; ++t) {
          const auto* row = reinterpret_cast<const float*>(wide.view().row(t));
          values.insert(values.end(), row, row + hidden);
          for (std::int64_t gap = hidden; gap < hidden + 4; ++gap) EXPECT_EQ(row[gap], 1e30F);
        }
        return values;
      };
      const Tensor d_out(Dtype::float32, rank.batch.d_out, {tokens, hidden}), dense_out = rank.zeros(), dense_d_x = rank.zeros();
      const Tensor x = strided(rank.batch.x), d = strided(rank.batch.d_out), out = strided(rank.batch.x), d_x = strided(rank.batch.x);
      MoeActivations saved, dense_saved;
      const RankGradients gradients(rank.weights), dense_gradients(rank.weights);
      rank.layer.forward(rank.x.view(), dense_out.view(), {}, &dense_saved);
      rank.layer.backward({.x = rank.x.view(), .d_out = d_out.view()}, dense_saved, dense_d_x.view(), dense_gradients.views());
      rank.layer.forward(rows_of(x), rows_of(out), {}, &saved);
      rank.layer.backward({.x = rows_of(x), .d_out = rows_of(d)}, saved, rows_of(d_x), gradients.views());
      EXPECT_EQ(values_of(out), dense_out.values());
      expect_close("d_x", values_of(d_x), dense_d_x.values(), 1e-6);
      EXPECT_EQ(gradients.gate.values(), dense_gradients.gate.values());
    });
  }
}

TEST(MoeStep, RefusesWhatDoesNotFit) {
  on_ranks({.sizes = {.flavour = Flavour::gpt_oss}}, [](OnRank& rank) {
    const auto contains = [](const std::string& text, const std::string& part) { EXPECT_NE(text.find(part), std::string::npos) << text; };
    MoeWeights weights = rank.weights.views();
    weights.gate.weight = {};
    contains(refusal([&] { MoeLayer(rank.group, weights, layer_options(rank.c)); }), "gate.weight is absent");
    weights = rank.weights.views();
    weights.experts.w13.shape[0] = 3;
    contains(refusal([&] { MoeLayer(rank.group, weights, layer_options(rank.c)); }), "local experts of rank 0");
    contains(refusal([&] { MoeLayer(nullptr, weights, layer_options(rank.c)); }), "no group");
    const Tensor narrow = Tensor::zeros(Dtype::float32, {9, 8}), halves = Tensor::zeros(Dtype::bfloat16, {9, 16});
    contains(refusal([&] { rank.layer.forward(rank.x.view(), narrow.view()); }), "out is [9, 8]");
    contains(refusal([&] { rank.layer.forward(rank.x.view(), halves.view()); }), "use one dtype");
    contains(refusal([&] { rank.layer.forward(rank.x.view(), rank.x.view(), {.sliced_out = true}); }), "sliced_out");
    contains(refusal([] { parse_expert_tp("both"); }), "use virtual or gathered");
    EXPECT_EQ(parse_expert_tp("gathered"), ExpertTp::gathered);
  });
  run_ranks(2, [](World& world) {
    LayerCase c = {.ep = 2};
    ExpertGroupOptions options = group_options(c);
    options.same_tokens = true;
    EXPECT_THROW(ExpertGroup(world, config_of(c), options), UsageError);
    options = group_options(c);
    options.dense_tp = 3;
    EXPECT_THROW(ExpertGroup(world, config_of(c), options), UsageError);
    EXPECT_THROW(ExpertGroup(world, config_of({.ep = 4}), group_options(c)), UsageError);
  });
}

}  // namespace
}  // namespace tokenyard::testing
