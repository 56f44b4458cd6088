// MoeLayer of float8 experts on GPUs, against the model in one process, whose weights are the same numbers.
//
// How near: a number rounded to float8 is off by 2^-4 of itself at most, and by 2.7 % in the mean square (a step of 2^-3 to 2^-4 of the
// number, over its square root of 12). Sums of many such products are off by as much, relative to their size. Rows that float8 holds
// exactly leave the activation's rounding alone: 2.7 %. Other rows add theirs, which gate and up both pass on: 2.7 % x sqrt(1 + 2). The
// bounds are half as much again. A scale that is another block's is off by a factor of two.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "device/layer_side.h"
#include "memory/cuda_graph.h"
#include "tokenyard/routing.h"
#include "unit/expect_usage_error.h"

namespace tokenyard::device_test {
namespace {

using testing::expect_usage_error;
using testing::Flavour;

constexpr Mode kModes[] = {Mode::throughput, Mode::latency};
constexpr double kExactRows = 0.04, kAnyRows = 0.07;

// Three blocks across a row of w13, of which one is short; shards are of one block or two.
constexpr ModelSizes kSizes = {.flavour = Flavour::qwen, .hidden = 272, .width = 256, .shared_width = 64, .float8 = true};

ModelSizes sizes_of(Flavour flavour) {
  ModelSizes sizes = kSizes;
  sizes.flavour = flavour;
  return sizes;
}

class DeviceLayerFloat8 : public OnGpu {};

void expect_near(const char* what, const Values& values, const Values& expected, double bound) {
  ASSERT_EQ(values.size(), expected.size()) << what;
  double error = 0, size = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    error += (values[i] - expected[i]) * (values[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  EXPECT_LE(std::sqrt(error), bound * std::sqrt(size)) << what;
}

void write_rows(LayerRank& rank, const Values& rows) {
  const Tensor host(rank.c.dtype, rows, {rank.batch.tokens, rank.c.sizes.hidden});
  rank.batch.x = host.values();
  OnDevice::write(rank.x, host.view());
}

// Rows that float8 holds exactly, with scales that are unlike each other.
void draw_exact(LayerRank& rank, int seed) {
  constexpr float kLargest = 448;
  const std::int64_t hidden = rank.c.sizes.hidden;
  const std::string of = std::to_string(seed) + " of " + std::to_string(rank.c.same_tokens ? 0 : rank.group->world().rank());
  Values rows = testing::drawn("exact x " + of, rank.batch.tokens * hidden, kLargest);
  for (std::int64_t i = 0; i < std::ssize(rows); ++i) {
    const std::int64_t row = i / hidden, column = i % hidden;
    const float value = column % kQuantiseBlock == 0 ? kLargest : static_cast<float>(rows[i]);
    rows[i] = float8_e4m3_to_float(float_to_float8_e4m3(value)) * std::exp2(-8 - (row + column / kQuantiseBlock) % 3);
  }
  write_rows(rank, rows);
}

void expect_answer(const LayerCase& c) {
  on_layer_ranks(c, [](LayerRank& rank) {
    for (const Mode mode : kModes) {
      for (int step = 0; step < 2; ++step) {
        rank.draw(step);
        rank.layer.forward(rank.x, rank.out, rank.options(mode));
        expect_near("out of any rows", rank.fetch(rank.out), rank.expected(), kAnyRows);
        draw_exact(rank, step);
        rank.layer.forward(rank.x, rank.out, rank.options(mode));
        expect_near("out of exact rows", rank.fetch(rank.out), rank.expected(), kExactRows);
      }
    }
  });
}

TEST_F(DeviceLayerFloat8, GivesTheAnswerOfItsNumbers) {
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
    for (const Flavour flavour : {Flavour::qwen, Flavour::deepseek, Flavour::gpt_oss}) {
      for (const int ep : {1, 2}) expect_answer({.sizes = sizes_of(flavour), .ep = ep, .dtype = dtype});
    }
  }
  expect_answer({.sizes = kSizes, .ep = 4, .dtype = Dtype::bfloat16});
}

TEST_F(DeviceLayerFloat8, ExpertsWithoutRows) {
  ModelSizes sizes = kSizes;
  sizes.experts = 24;
  sizes.top_k = 1;
  for (const int ep : {1, 2}) expect_answer({.sizes = sizes, .ep = ep, .dtype = Dtype::bfloat16});
}

TEST_F(DeviceLayerFloat8, RanksWithoutExperts) {
  const Placement placement = Placement::custom(2, {{{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}, {{{1}, 1}}});
  for (const Flavour flavour : {Flavour::qwen, Flavour::deepseek})
    expect_answer({.sizes = sizes_of(flavour), .ep = 2, .dtype = Dtype::bfloat16, .placement = placement});
}

TEST_F(DeviceLayerFloat8, VirtualShards) {
  for (const Flavour flavour : {Flavour::qwen, Flavour::gpt_oss})
    expect_answer({.sizes = sizes_of(flavour), .ep = 2, .tp = 2, .dtype = Dtype::bfloat16});
}

TEST_F(DeviceLayerFloat8, GatheredShards) {
  for (const int ep : {1, 2})
    expect_answer({.sizes = kSizes, .ep = ep, .tp = 2, .expert_tp = ExpertTp::gathered, .dtype = Dtype::bfloat16});
  for (const bool sliced_out : {false, true})
    expect_answer({.sizes = kSizes, .tp = 2, .dtype = Dtype::bfloat16, .same_tokens = true, .sliced_out = sliced_out});
}

// Beside a layer of the same numbers in bfloat16: it chooses alike, and sends rows of half the bytes, and their scales.
TEST_F(DeviceLayerFloat8, RoutesAlikeAndSendsHalfTheBytes) {
  on_layer_ranks({.sizes = kSizes, .ep = 2, .dtype = Dtype::bfloat16}, [](LayerRank& rank) {
    const std::int64_t tokens = rank.batch.tokens, hidden = rank.c.sizes.hidden, experts = rank.c.sizes.experts;
    LayerCase wide = rank.c;
    wide.sizes.float8 = false;
    const RankWeights weights = testing::weights_of(rank.model, *rank.group, wide);
    MoeLayer same(rank.group, rank.device.copy(weights.views()), testing::layer_options(wide));
    const Tensor none = Tensor::zeros(Dtype::float32, {tokens, experts});
    MoeStepOptions options = rank.options(Mode::throughput), of_same = options;
    options.logits = rank.device.copy(none.view());
    of_same.logits = rank.device.copy(none.view());
    rank.group->world().barrier();
    std::vector<std::vector<std::int64_t>> bytes = {rank.group->exchange()->link_bytes()};
    const auto note_bytes = [&] {
      cuda_check(cudaStreamSynchronize(rank.stream.get()), "cudaStreamSynchronize");
      bytes.push_back(rank.group->exchange()->link_bytes());
    };
    rank.layer.forward(rank.x, rank.out, options);
    note_bytes();
    same.forward(rank.x, rank.out, of_same);
    note_bytes();
    testing::expect_close("out in bfloat16", rank.fetch(rank.out), rank.expected(), 2e-2);
    const Tensor logits(Dtype::float32, rank.fetch(options.logits), {tokens, experts});
    EXPECT_EQ(logits.values(), rank.fetch(of_same.logits));
    const Routing routing = route({.logits = logits.view()}, testing::gate_of(rank.c.sizes));
    std::int64_t sent[2] = {0, 0};  // rows to each rank
    for (std::int64_t t = 0; t < tokens; ++t) {
      const auto chosen = rank.model.choose(&rank.batch.x[t * hidden]).experts;
      EXPECT_EQ(std::vector<int>(&routing.topk_ids[t * routing.top_k], &routing.topk_ids[(t + 1) * routing.top_k]), chosen)
          << "token " << t;
      for (int to = 0; to < 2; ++to) sent[to] += std::any_of(chosen.begin(), chosen.end(), [&](int expert) { return expert / 3 == to; });
    }
    const std::int64_t saved = 2 * hidden - (hidden + 4 * scale_columns(hidden, ScaleFormat::float32));
    for (int to = 0; to < 2; ++to)
      EXPECT_EQ((bytes[2][to] - bytes[1][to]) - (bytes[1][to] - bytes[0][to]), sent[to] * saved) << "to rank " << to;
  });
}

TEST_F(DeviceLayerFloat8, ReplaysOfAGraphFollowTheirRowsAndNoStepTakesMemory) {
  for (const LayerCase& c : {LayerCase{.sizes = sizes_of(Flavour::deepseek), .dtype = Dtype::bfloat16},
                             LayerCase{.sizes = sizes_of(Flavour::deepseek), .ep = 2, .dtype = Dtype::bfloat16},
                             LayerCase{.sizes = kSizes, .ep = 2, .tp = 2, .dtype = Dtype::bfloat16}}) {
    on_layer_ranks(c, [](LayerRank& rank) {
      const TensorView again = rank.device.copy(Tensor::zeros(rank.c.dtype, {rank.batch.tokens, rank.c.sizes.hidden}).view());
      const std::int64_t counts[] = {rank.batch.tokens};
      rank.layer.warm_up(counts);
      const CudaGraph graph(rank.stream.get(), [&] {
        rank.layer.forward(rank.x, again, rank.options(Mode::latency));
        rank.layer.forward(rank.x, rank.out, rank.options(Mode::throughput));
      });
      graph.launch();
      cuda_check(cudaStreamSynchronize(rank.stream.get()), "cudaStreamSynchronize");
      rank.group->world().barrier();
      const std::size_t before = free_on_all_gpus();
      rank.group->world().barrier();
      for (int replay = 0; replay < 10; ++replay) {
        draw_exact(rank, replay);
        graph.launch();
        expect_near("out of a replay", rank.fetch(rank.out), rank.expected(), kExactRows);
        expect_near("out of a replay, latency", rank.fetch(again), rank.expected(), kExactRows);
        rank.layer.forward(rank.x, rank.out, rank.options(kModes[replay % 2]));
        expect_near("out, eager", rank.fetch(rank.out), rank.expected(), kExactRows);
      }
      rank.group->world().barrier();
      EXPECT_EQ(free_on_all_gpus(), before);
    });
  }
}

// Also of a group that goes backward with other layers.
TEST_F(DeviceLayerFloat8, GoesForwardOnly) {
  for (const bool gradients : {false, true}) {
    on_layer_ranks(
        {.sizes = kSizes, .dtype = Dtype::bfloat16},
        [](LayerRank& rank) {
          const MoeStepOptions options = rank.options(Mode::throughput);
          MoeActivations saved;
          expect_usage_error([&] { rank.layer.forward(rank.x, rank.out, options, &saved); },
                             {"float8_e4m3 goes forward only", "widen the weights"});
          expect_usage_error([&] { rank.layer.backward({.x = rank.x, .d_out = rank.out, .options = options}, saved, rank.x, {}); },
                             {"float8_e4m3 goes forward only"});
          rank.layer.forward(rank.x, rank.out, options);
          expect_near("out", rank.fetch(rank.out), rank.expected(), kAnyRows);
        },
        [gradients](ExpertGroupOptions& change) { change.gradients = gradients; });
  }
}

TEST_F(DeviceLayerFloat8, SaysWhatDoesNotFit) {
  const auto expect_refused = [](const LayerCase& c, std::initializer_list<std::string_view> parts) {
    run_ranks(c.ep * c.tp, [&](World& world) { expect_usage_error([&] { LayerRank(world, c); }, parts); });
  };
  expect_refused({.sizes = kSizes}, {"float8_e4m3", "the group's dtype float32", "ExpertGroupOptions::dtype = bfloat16"});
  ModelSizes narrow = kSizes;
  narrow.width = 128;
  expect_refused({.sizes = narrow, .ep = 2, .tp = 2, .dtype = Dtype::bfloat16},
                 {"[3, 2, 64, 272] float8_e4m3", "multiple of 128", "fewer shards"});
  on_layer_ranks({.sizes = kSizes, .dtype = Dtype::bfloat16}, [](LayerRank& rank) {
    TensorView halves = rank.x;
    halves.dtype = Dtype::float16;
    expect_usage_error([&] { rank.layer.forward(halves, halves, rank.options(Mode::throughput)); },
                       {"x is", "float16", "float8_e4m3", "of the group's dtype, bfloat16"});
    expect_usage_error([&] { MoeLayer(rank.group, rank.weights.views(), testing::layer_options(rank.c)); },
                       {"w13", "ordinary host memory"});
  });
}

}  // namespace
}  // namespace tokenyard::device_test
