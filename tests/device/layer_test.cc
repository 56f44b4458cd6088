// MoeLayer on GPUs gives the single-process answer: every gate and activation, every division of experts that GPUs serve, ranks without
// tokens or experts, in both modes, over and over from a graph, and without taking memory.

#include <gtest/gtest.h>

#include "device/layer_side.h"
#include "memory/cuda_graph.h"
#include "tokenyard/routing.h"
#include "unit/expect_usage_error.h"

namespace tokenyard::device_test {
namespace {

using testing::expect_usage_error;
using testing::Flavour;
using testing::kFlavours;

constexpr Mode kModes[] = {Mode::throughput, Mode::latency};

double tolerance_of(Dtype dtype) { return dtype == Dtype::float32 ? 1e-5 : 2e-2; }

class DeviceLayer : public OnGpu {};

void expect_single_process_answer(const LayerCase& of) {
  LayerCase c = of;
  c.tolerance = tolerance_of(c.dtype);
  on_layer_ranks(c, [](LayerRank& rank) {
    for (const Mode mode : kModes) {
      for (int step = 0; step < 3; ++step) {
        rank.layer.forward(rank.x, rank.out, rank.options(mode));
        rank.expect_answer(mode == Mode::latency ? "out, latency" : "out, throughput");
        rank.draw(step);
      }
    }
  });
}

TEST_F(DeviceLayer, EveryGateAndActivation) {
  for (const Flavour flavour : kFlavours) {
    for (const int ep : {1, 2, 4}) expect_single_process_answer({.sizes = {.flavour = flavour}, .ep = ep});
  }
}

TEST_F(DeviceLayer, HalfPrecision) {
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
    for (const Flavour flavour : {Flavour::deepseek, Flavour::gpt_oss, Flavour::qwen2}) {
      for (const int ep : {1, 2}) {
        expect_single_process_answer(
            {.sizes = {.flavour = flavour, .hidden = 256, .width = 64, .shared_width = 64}, .ep = ep, .dtype = dtype});
      }
    }
  }
}

TEST_F(DeviceLayer, VirtualShards) {
  for (const Flavour flavour : {Flavour::deepseek, Flavour::gpt_oss})
    expect_single_process_answer({.sizes = {.flavour = flavour}, .ep = 2, .tp = 2});
  expect_single_process_answer({.sizes = {.experts = 12, .top_k = 9}, .ep = 2, .tp = 4});
}

TEST_F(DeviceLayer, GatheredShards) {
  for (const auto& [ep, tp] : {std::pair{2, 2}, {1, 2}, {1, 4}, {4, 1}}) {
    for (const Flavour flavour : {Flavour::deepseek, Flavour::gpt_oss, Flavour::qwen2})
      expect_single_process_answer({.sizes = {.flavour = flavour}, .ep = ep, .tp = tp, .expert_tp = ExpertTp::gathered});
    expect_single_process_answer({.sizes = {.flavour = Flavour::deepseek, .hidden = 256, .width = 64, .shared_width = 64},
                                  .ep = ep,
                                  .tp = tp,
                                  .expert_tp = ExpertTp::gathered,
                                  .dtype = Dtype::bfloat16});
  }
  expect_single_process_answer({.sizes = {.experts = 12, .top_k = 9}, .ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered});
}

// A window with most experts, and one with none.
TEST_F(DeviceLayer, GatheredShardsOfUnevenWindows) {
  const Placement uneven = Placement::custom(2, {{{{1}, 1}}, {{{0}, 1}}, {{{0}, 1}}, {{{0}, 1}}, {{{1}, 1}}, {{{0}, 1}}});
  const Placement one = Placement::custom(2, {{{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}});
  for (const Placement& placement : {uneven, one})
    expect_single_process_answer({.ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered, .placement = placement});
}

TEST_F(DeviceLayer, GatheredShardsBesideACutSharedExpert) {
  for (const auto& [ep, tp] : {std::pair{2, 2}, {1, 4}}) {
    expect_single_process_answer(
        {.sizes = {.flavour = Flavour::qwen2}, .ep = ep, .tp = tp, .expert_tp = ExpertTp::gathered, .dense_tp = 2});
  }
}

TEST_F(DeviceLayer, ShardsOfTheSameTokens) {
  for (const bool sliced_out : {false, true}) {
    for (const int tp : {2, 4}) {
      for (const Flavour flavour : {Flavour::qwen, Flavour::qwen2})
        expect_single_process_answer({.sizes = {.flavour = flavour}, .tp = tp, .same_tokens = true, .sliced_out = sliced_out});
    }
    expect_single_process_answer(
        {.sizes = {.flavour = Flavour::qwen2}, .tp = 4, .dense_tp = 2, .same_tokens = true, .sliced_out = sliced_out});
  }
}

TEST_F(DeviceLayer, OuterReplicasAreIndependent) {
  expect_single_process_answer({.sizes = {.flavour = Flavour::deepseek}, .tp = 2, .outer_dp = 2});
  expect_single_process_answer({.sizes = {.flavour = Flavour::deepseek}, .ep = 2, .outer_dp = 2});
}

TEST_F(DeviceLayer, ASharedExpertCutOverRanks) {
  for (const Flavour flavour : {Flavour::deepseek, Flavour::qwen2}) {
    for (const int dense_tp : {2, 4}) expect_single_process_answer({.sizes = {.flavour = flavour}, .ep = 4, .dense_tp = dense_tp});
    expect_single_process_answer({.sizes = {.flavour = flavour}, .ep = 2, .dtype = Dtype::bfloat16, .dense_tp = 2});
  }
}

// Rank 3 has no experts at all.
TEST_F(DeviceLayer, ReplicasAndUnevenRanks) {
  const Placement placement =
      Placement::custom(4, {{{{0}, 1}, {{2}, 2}}, {{{1}, 1}}, {{{0}, 1}, {{1}, 1}}, {{{2}, 1}}, {{{2}, 1}}, {{{0}, 1}}});
  for (const Flavour flavour : {Flavour::qwen, Flavour::deepseek}) {
    expect_single_process_answer({.sizes = {.flavour = flavour}, .ep = 4, .placement = placement});
  }
}

TEST_F(DeviceLayer, WritesOverItsInputWhenAskedTo) {
  const ModelSizes sizes = {.flavour = Flavour::qwen2};
  for (const LayerCase& c : {LayerCase{.sizes = sizes}, LayerCase{.sizes = sizes, .ep = 2}, LayerCase{.sizes = sizes, .tp = 2},
                             LayerCase{.sizes = sizes, .tp = 2, .same_tokens = true}}) {
    on_layer_ranks(c, [](LayerRank& rank) {
      rank.layer.forward(rank.x, rank.x, rank.options(Mode::throughput));
      testing::expect_close("out", rank.fetch(rank.x), rank.expected(), 2e-5);
    });
  }
}

TEST_F(DeviceLayer, ReplaysAndMasks) {
  on_layer_ranks({.ep = 2}, [](LayerRank& rank) {
    const std::int64_t tokens = rank.batch.tokens;
    testing::Replay replay = testing::replay_of(rank.model, rank.batch, rank.c.sizes.hidden);
    MoeStepOptions options = rank.options(Mode::throughput);
    options.mask = rank.device.copy({replay.mask.data(), Dtype::uint8, {tokens}});
    options.given_ids = rank.device.copy({replay.ids.data(), Dtype::int64, {tokens, 3}});
    rank.group->world().barrier();
    rank.layer.forward(rank.x, rank.out, options);
    testing::expect_close("out", rank.fetch(rank.out), replay.outputs, 2e-5);
  });
}

TEST_F(DeviceLayer, LeavesTheLogitsOfItsChoice) {
  on_layer_ranks({.sizes = {.flavour = Flavour::deepseek}, .ep = 2}, [](LayerRank& rank) {
    const std::int64_t tokens = rank.batch.tokens, experts = rank.c.sizes.experts;
    MoeStepOptions options = rank.options(Mode::throughput);
    options.logits = rank.device.copy(Tensor::zeros(Dtype::float32, {tokens, experts}).view());
    rank.group->world().barrier();
    rank.layer.forward(rank.x, rank.out, options);
    const Tensor logits(Dtype::float32, rank.fetch(options.logits), {tokens, experts});
    const Routing routing = route({.logits = logits.view(), .bias = rank.weights.selection_bias.view()}, testing::gate_of(rank.c.sizes));
    for (std::int64_t t = 0; t < tokens; ++t) {
      const auto chosen = rank.model.choose(&rank.batch.x[t * rank.c.sizes.hidden]).experts;
      const std::vector<int> found(routing.topk_ids.begin() + t * routing.top_k, routing.topk_ids.begin() + (t + 1) * routing.top_k);
      EXPECT_EQ(found, chosen) << "token " << t;
    }
  });
}

TEST_F(DeviceLayer, OneExchangeServesAllLayers) {
  on_layer_ranks({.sizes = {.flavour = Flavour::deepseek}, .ep = 4}, [](LayerRank& rank) {
    LayerCase other = {.sizes = {.flavour = Flavour::qwen}, .ep = 4};
    other.placement = Placement::custom(4, {{{{3}, 1}}, {{{2}, 1}}, {{{2}, 1}}, {{{1}, 1}}, {{{0}, 1}}, {{{3}, 1}}});
    const Model model(other.sizes, 2);
    const RankWeights weights = testing::weights_of(model, *rank.group, other);
    MoeLayer second(rank.group, rank.device.copy(weights.views()), testing::layer_options(other));
    const TensorView middle = rank.device.copy(Tensor::zeros(Dtype::float32, {rank.batch.tokens, rank.c.sizes.hidden}).view());
    rank.group->world().barrier();
    rank.layer.forward(rank.x, middle, rank.options(Mode::throughput));
    second.forward(middle, rank.out, rank.options(Mode::latency));
    Values expected;
    for (std::int64_t t = 0; t < rank.batch.tokens; ++t) {
      const Values row = model.forward(rank.model.forward(&rank.batch.x[t * rank.c.sizes.hidden]).data());
      expected.insert(expected.end(), row.begin(), row.end());
    }
    testing::expect_close("out", rank.fetch(rank.out), expected, 5e-5);
  });
}

// A graph of two layers' worth of steps, one in each mode, replayed with other rows between eager steps.
TEST_F(DeviceLayer, ReplaysOfAGraphFollowTheirRows) {
  for (const Flavour flavour : {Flavour::qwen, Flavour::qwen2}) {
    const ModelSizes sizes = {.flavour = flavour};
    for (const LayerCase& c : {LayerCase{.sizes = sizes}, LayerCase{.sizes = sizes, .ep = 2}, LayerCase{.sizes = sizes, .ep = 4},
                               LayerCase{.sizes = sizes, .ep = 4, .dense_tp = 2}, LayerCase{.sizes = sizes, .tp = 2},
                               LayerCase{.sizes = sizes, .tp = 2, .same_tokens = true},
                               LayerCase{.sizes = sizes, .ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered}}) {
      on_layer_ranks(c, [](LayerRank& rank) {
        const TensorView again = rank.device.copy(Tensor::zeros(Dtype::float32, {rank.batch.tokens, rank.c.sizes.hidden}).view());
        const std::int64_t counts[] = {rank.batch.tokens};
        rank.layer.warm_up(counts);
        const CudaGraph graph(rank.stream.get(), [&] {
          rank.layer.forward(rank.x, again, rank.options(Mode::latency));
          rank.layer.forward(rank.x, rank.out, rank.options(Mode::throughput));
        });
        rank.group->world().barrier();
        for (int replay = 0; replay < 20; ++replay) {
          rank.draw(replay);
          graph.launch();
          rank.expect_answer("out of a replay");
          testing::expect_close("out of a replay, latency", rank.fetch(again), rank.expected(), 2e-5);
          if (replay % 3 != 0) continue;
          rank.draw(100 + replay);
          rank.layer.forward(rank.x, rank.out, rank.options(replay % 2 == 0 ? Mode::latency : Mode::throughput));
          rank.expect_answer("out, eager");
        }
      });
    }
  }
}

TEST_F(DeviceLayer, ALaterStepTakesNoMemory) {
  const ModelSizes sizes = {.flavour = Flavour::deepseek};
  for (const LayerCase& c :
       {LayerCase{.sizes = sizes}, LayerCase{.sizes = sizes, .ep = 2}, LayerCase{.sizes = sizes, .ep = 2, .dense_tp = 2},
        LayerCase{.sizes = sizes, .tp = 2}, LayerCase{.sizes = sizes, .tp = 2, .same_tokens = true},
        LayerCase{.sizes = sizes, .ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered}}) {
    on_layer_ranks(c, [](LayerRank& rank) {
      const std::int64_t counts[] = {0, 9};
      rank.layer.warm_up(counts);
      rank.group->world().barrier();
      const std::size_t before = free_on_all_gpus();
      rank.group->world().barrier();
      for (int step = 0; step < 10; ++step) rank.layer.forward(rank.x, rank.out, rank.options(kModes[step % 2]));
      rank.expect_answer("out");
      rank.group->world().barrier();
      EXPECT_EQ(free_on_all_gpus(), before);
      const std::int64_t too_many[] = {10};
      EXPECT_THROW(rank.layer.warm_up(too_many), UsageError);
    });
  }
}

TEST_F(DeviceLayer, NotesItsPhases) {
  const auto expect_phases = [](const LayerCase& c, const std::vector<std::string>& expected) {
    const auto steps = [&](LayerRank& rank) {
      rank.layer.forward(rank.x, rank.out, rank.options(Mode::throughput));
      std::vector<std::string> phases;
      for (const PhaseSpan& span : rank.group->take_spans()) {
        phases.push_back(span.phase);
        EXPECT_LE(span.begin_ns, span.end_ns);
      }
      EXPECT_EQ(phases, expected);
    };
    on_layer_ranks(c, steps, [](ExpertGroupOptions& options) { options.trace = true; });
  };
  const ModelSizes sizes = {.flavour = Flavour::deepseek};
  expect_phases({.sizes = sizes, .ep = 2}, {"gate", "route", "dispatch", "shared", "experts", "combine"});
  expect_phases({.sizes = sizes, .ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered},
                {"gate", "route", "dispatch", "shared", "gather", "experts", "reduce", "combine"});
}

// Rank 0 refuses: the other learns why in the same step, and the next step is fine.
void expect_refusal_told(const LayerCase& c) {
  on_layer_ranks(c, [](LayerRank& rank) {
    const MoeStepOptions options = rank.options(Mode::throughput);
    if (rank.group->world().rank() == 0) {
      TensorView wrong = rank.x;
      wrong.dtype = Dtype::bfloat16;
      expect_usage_error([&] { rank.layer.forward(wrong, wrong, options); }, {"on GPUs rows and weights are of one dtype", "float32"});
    } else {
      try {
        rank.layer.forward(rank.x, rank.out, options);
        cuda_check(cudaStreamSynchronize(rank.stream.get()), "cudaStreamSynchronize");
        rank.group->check();
        ADD_FAILURE() << "rank 1 was told nothing";
      } catch (const TransportError& error) {
        EXPECT_EQ(error.failure().kind, FailureKind::aborted);
        EXPECT_NE(std::string(error.what()).find("rows and weights are of one dtype"), std::string::npos) << error.what();
      }
    }
    cuda_check(cudaStreamSynchronize(rank.stream.get()), "cudaStreamSynchronize");
    try {
      rank.group->check();  // where the step had begun, its later calls were refused, too
    } catch (const TransportError& error) {
      EXPECT_EQ(error.failure().kind, FailureKind::aborted);
    }
    rank.group->world().barrier();
    rank.layer.forward(rank.x, rank.out, options);
    rank.expect_answer("out of the next step");
  });
}

const ModelSizes kWithShared = {.flavour = Flavour::deepseek};
TEST_F(DeviceLayer, ARefusedStepIsToldToPeers) { expect_refusal_told({.sizes = kWithShared, .ep = 2}); }
TEST_F(DeviceLayer, ARefusedStepOfACutSharedExpertIsToldToPeers) { expect_refusal_told({.sizes = kWithShared, .ep = 2, .dense_tp = 2}); }
TEST_F(DeviceLayer, ARefusedStepOfGatheredShardsIsToldToPeers) {
  expect_refusal_told({.sizes = kWithShared, .tp = 2});
  expect_refusal_told({.sizes = kWithShared, .tp = 2, .same_tokens = true});
}

TEST_F(DeviceLayer, SaysWhatGpusDoNotDo) {
  on_layer_ranks({}, [](LayerRank& rank) {
    const MoeStepOptions options = rank.options(Mode::throughput);
    MoeActivations saved;
    expect_usage_error([&] { rank.layer.forward(rank.x, rank.out, options, &saved); }, {"without gradients"});
    expect_usage_error([&] { rank.layer.backward({.x = rank.x, .d_out = rank.out}, saved, rank.x, {}); }, {"saved is of 0 tokens"});
    const Tensor host = Tensor::zeros(rank.c.dtype, {rank.batch.tokens, rank.c.sizes.hidden});
    expect_usage_error([&] { rank.layer.forward(host.view(), rank.out, options); }, {"x is", "ordinary host memory"});
    expect_usage_error([&] { MoeLayer(rank.group, rank.weights.views(), testing::layer_options(rank.c)); },
                       {"w13", "ordinary host memory"});
  });
  run_ranks(4, [](World& world) {
    const LayerCase c = {.ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered};
    ExpertGroupOptions options = gpu_options(c, use_gpu_of(world.rank()), 4);
    options.max_expert_rows = 1;
    expect_usage_error([&] { ExpertGroup(world, testing::config_of(c), options); }, {"max_expert_rows = 1", "lower receive_rows"});
  });
}

}  // namespace
}  // namespace tokenyard::device_test
