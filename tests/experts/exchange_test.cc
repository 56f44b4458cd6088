// Routing, dispatch, experts, combine on ranks, with weights that each rank drew for its own shard: the single-process answer, for
// every layout and every way to place experts.

#include <gtest/gtest.h>

#include <cmath>

#include "tokenyard/experts.h"
#include "tokenyard/parallel.h"
#include "tokenyard/routing.h"
#include "tokenyard/weights.h"

namespace tokenyard {
namespace {

constexpr int kExperts = 6;
constexpr std::int64_t kHidden = 16;
constexpr std::int64_t kWidth = 12;
constexpr int kTopK = 3;
constexpr std::int64_t kTokens = 11;  // of the fullest rank
constexpr ExpertShape kShape = {.num_experts = kExperts, .hidden_size = kHidden, .expert_width = kWidth};

// Numbers that depend on nothing but where they are.
std::vector<float> drawn(const std::string& name, const ShardMap& map, float scale) {
  std::vector<float> values(static_cast<std::size_t>(map.local_elements()));
  initialise(name, {.distribution = Distribution::uniform, .scale = scale, .seed = 11}, map,
             {values.data(), Dtype::float32, {std::ssize(values)}});
  return values;
}
std::vector<float> drawn(const std::string& name, std::int64_t count, float scale) { return drawn(name, ShardMap::whole(count), scale); }

// The shard of one rank. w2_bias is on the first shard alone: the others get zeros here.
struct Shard {
  std::int64_t experts, width;
  std::vector<float> w13, w2, w13_bias, w2_bias;

  Shard(const Placement& placement, int rank) : experts(std::ssize(placement.local_experts(rank))) {
    const auto part = [&](ExpertTensor tensor) {
      return drawn(std::string(name(tensor)), expert_shard(tensor, kShape, placement, rank), 0.5F);
    };
    w13 = part(ExpertTensor::w13);
    w2 = part(ExpertTensor::w2);
    w13_bias = part(ExpertTensor::w13_bias);
    w2_bias = part(ExpertTensor::w2_bias);
    w2_bias.resize(static_cast<std::size_t>(experts * kHidden), 0.0F);
    width = experts == 0 ? 1 : std::ssize(w2) / (experts * kHidden);
  }
  ExpertWeights weights() const {
    return {.w13 = {w13.data(), Dtype::float32, {experts, 2, width, kHidden}},
            .w2 = {w2.data(), Dtype::float32, {experts, kHidden, width}},
            .w13_bias = {w13_bias.data(), Dtype::float32, {experts, 2, width}},
            .w2_bias = {w2_bias.data(), Dtype::float32, {experts, kHidden}}};
  }
};

struct Batch {
  std::int64_t tokens;
  std::vector<float> rows;
  Routing routing;
};

// Of one rank; rank 1 has none.
Batch batch_of(int rank) {
  Batch batch{rank == 1 ? 0 : kTokens - rank, {}, {}};
  batch.rows = drawn("rows " + std::to_string(rank), batch.tokens * kHidden, 1);
  const std::vector<float> logits = drawn("logits " + std::to_string(rank), batch.tokens * kExperts, 3);
  batch.routing = route({.logits = {logits.data(), Dtype::float32, {batch.tokens, kExperts}}}, Gate::softmax(kTopK, true));
  return batch;
}

// Every expert on its own, in float64, for one token.
std::vector<double> single_process(const Shard& all, const Batch& batch, std::int64_t token) {
  std::vector<double> sum(kHidden, 0.0);
  for (int k = 0; k < kTopK; ++k) {
    const std::int64_t e = batch.routing.topk_ids[token * kTopK + k];
    for (std::int64_t i = 0; i < kWidth; ++i) {
      double gate = all.w13_bias[e * 2 * kWidth + i];
      double up = all.w13_bias[(e * 2 + 1) * kWidth + i];
      for (std::int64_t h = 0; h < kHidden; ++h) {
        gate += double{all.w13[(e * 2 * kWidth + i) * kHidden + h]} * batch.rows[token * kHidden + h];
        up += double{all.w13[((e * 2 + 1) * kWidth + i) * kHidden + h]} * batch.rows[token * kHidden + h];
      }
      const double act = gate / (1 + std::exp(-gate)) * up;
      for (std::int64_t h = 0; h < kHidden; ++h) {
        sum[h] += double{batch.routing.topk_weights[token * kTopK + k]} * all.w2[(e * kHidden + h) * kWidth + i] * act;
      }
    }
    for (std::int64_t h = 0; h < kHidden; ++h)
      sum[h] += double{batch.routing.topk_weights[token * kTopK + k]} * all.w2_bias[e * kHidden + h];
  }
  return sum;
}

// Dispatch, experts and combine of one layout; the sums of this rank's tokens.
std::vector<float> through_experts(Exchange& exchange, const Batch& batch, const Shard& shard, Layout layout) {
  Received received = exchange.dispatch({.rows = {batch.rows.data(), Dtype::float32, {batch.tokens, kHidden}},
                                         .topk_ids = batch.routing.ids_view(),
                                         .topk_weights = batch.routing.weights_view()},
                                        {.layout = layout,
                                         .sizing = layout == Layout::rank_slots ? Sizing::capacity : Sizing::exact,
                                         .mode = layout == Layout::rank_slots ? Mode::latency : Mode::throughput,
                                         .alignment = layout == Layout::expert_major ? 4 : 1});
  const RowGroups groups = RowGroups::of(received, static_cast<int>(shard.experts));
  const TensorView rows = received.rows();
  const std::int64_t num_rows = rows.num_elements() / kHidden;
  const ConstTensorView x(rows.data, Dtype::float32, {num_rows, kHidden});
  std::vector<float> y(static_cast<std::size_t>(groups.places * kHidden));
  const TensorView places(y.data(), Dtype::float32, {groups.places, kHidden});
  experts_forward(x, groups, shard.weights(), {}, places, nullptr);
  const bool is_folded_here = layout == Layout::token_major || layout == Layout::rank_slots;
  std::vector<float> folded(is_folded_here ? static_cast<std::size_t>(num_rows * kHidden) : 0);
  if (is_folded_here) {
    unpermute(places, groups, received.local_ids(), received.row_weights(), {folded.data(), Dtype::float32, {num_rows, kHidden}});
  }
  TensorView result = rows;  // the same shape, other rows
  result.data = is_folded_here ? folded.data() : y.data();
  const Combined sums = exchange.combine(result, received.handle(), {.weighting = is_folded_here ? Weighting::none : Weighting::at_expert});
  return {sums.out.as<float>(), sums.out.as<float>() + batch.tokens * kHidden};
}

void expect_single_process_answer(World& world, const Placement& placement) {
  const Shard all(Placement::uniform(kExperts, 1), 0);
  const Shard mine(placement, world.rank());
  const Batch batch = batch_of(world.rank());
  for (const Layout layout : {Layout::token_major, Layout::expert_major, Layout::expert_padded, Layout::rank_slots}) {
    Exchange exchange(world, {.max_tokens_per_rank = kTokens,
                              .max_row_bytes = kHidden * 4,
                              .top_k = kTopK,
                              .max_local_experts = placement.max_local_experts(),
                              .max_fanout = placement.max_fanout(),
                              .mode = layout == Layout::rank_slots ? Mode::latency : Mode::throughput});
    exchange.add(placement);
    const std::vector<float> sums = through_experts(exchange, batch, mine, layout);
    for (std::int64_t token = 0; token < batch.tokens; ++token) {
      const std::vector<double> expected = single_process(all, batch, token);
      for (std::int64_t h = 0; h < kHidden; ++h) {
        ASSERT_NEAR(sums[token * kHidden + h], expected[h], 1e-5) << name(layout) << ", token " << token;
      }
    }
  }
}

TEST(ExpertsOnRanks, EveryConfigurationGivesTheSingleProcessAnswer) {
  for (const auto& [ep, tp] : {std::pair{1, 1}, {2, 1}, {1, 2}, {2, 2}, {4, 1}, {1, 4}, {2, 4}, {4, 2}, {8, 1}}) {
    SCOPED_TRACE("ep " + std::to_string(ep) + ", tp " + std::to_string(tp));
    const ParallelConfig config = solve_parallel({.device_count = ep * tp, .ep = ep});
    ASSERT_EQ(config.mlp_tp, tp);
    const Placement placement = Placement::tensor_parallel(kExperts, config.ep, config.mlp_tp);
    run_ranks(ep * tp, [&](World& world) { expect_single_process_answer(world, placement); });
  }
}

TEST(ExpertsOnRanks, ReplicasAndUnevenRanks) {
  // Rank 3 has no expert.
  const Placement placement =
      Placement::custom(4, {{{{0}, 1}, {{2}, 2}}, {{{1}, 1}}, {{{0}, 1}, {{1}, 1}}, {{{2}, 1}}, {{{2}, 1}}, {{{0}, 1}}});
  run_ranks(4, [&](World& world) { expect_single_process_answer(world, placement); });
}

// outer_dp = 2 on 4 ranks: two exchanges that know nothing of each other.
TEST(ExpertsOnRanks, OuterReplicasAreIndependentExchanges) {
  const ParallelConfig config = solve_parallel({.device_count = 4, .ep = 2, .outer_dp = 2});
  run_ranks(4, [&](World& world) {
    const SplitArguments at = config.split_arguments(SubWorld::ep_tp, world.rank());
    std::optional<World> inner = world.split(at.color, at.key);
    ASSERT_TRUE(inner.has_value());
    EXPECT_EQ(inner->size(), 2);
    if (at.color == 1) world.barrier();  // the second replica does nothing until the first has finished
    expect_single_process_answer(*inner, Placement::tensor_parallel(kExperts, config.ep, config.mlp_tp));
    if (at.color == 0) world.barrier();
  });
}

}  // namespace
}  // namespace tokenyard
