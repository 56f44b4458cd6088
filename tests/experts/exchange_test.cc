// Routing, dispatch, experts, combine on ranks, with weights that each rank drew for its own shard: the single-process answer, for
// every layout and every way to place experts, forward and backward.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>

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
  std::vector<float> rows, grad_out;
  Routing routing;
};

// Tokens [first, first + count): a micro-batch.
Batch part_of(const Batch& batch, std::int64_t first, std::int64_t count) {
  const auto cut = [&](const auto& values, std::int64_t per_token) {
    return std::decay_t<decltype(values)>(values.begin() + first * per_token, values.begin() + (first + count) * per_token);
  };
  return {count,
          cut(batch.rows, kHidden),
          cut(batch.grad_out, kHidden),
          {kTopK, cut(batch.routing.topk_ids, kTopK), cut(batch.routing.topk_weights, kTopK), {}}};
}

// Of one rank; rank 1 has none.
Batch batch_of(int rank) {
  Batch batch{rank == 1 ? 0 : kTokens - rank, {}, {}, {}};
  batch.rows = drawn("rows " + std::to_string(rank), batch.tokens * kHidden, 1);
  batch.grad_out = drawn("grad_out " + std::to_string(rank), batch.tokens * kHidden, 1);
  const std::vector<float> logits = drawn("logits " + std::to_string(rank), batch.tokens * kExperts, 3);
  batch.routing = route({.logits = {logits.data(), Dtype::float32, {batch.tokens, kExperts}}}, Gate::softmax(kTopK, true));
  return batch;
}

// The whole model in one process, in float64: every token of every rank through every expert it chose, and the gradients.
struct SingleProcess {
  struct OfRank {
    std::vector<double> sums, d_rows, d_topk_weights;
  };
  std::vector<OfRank> ranks;
  std::vector<double> d_w13, d_w2, d_w13_bias, d_w2_bias;

  explicit SingleProcess(int num_ranks)
      : d_w13(kExperts * 2 * kWidth * kHidden),
        d_w2(kExperts * kHidden * kWidth),
        d_w13_bias(kExperts * 2 * kWidth),
        d_w2_bias(kExperts * kHidden) {
    const Shard all(Placement::uniform(kExperts, 1), 0);
    for (int rank = 0; rank < num_ranks; ++rank) {
      const Batch batch = batch_of(rank);
      const auto row_elements = static_cast<std::size_t>(batch.tokens * kHidden);
      ranks.push_back({std::vector<double>(row_elements), std::vector<double>(row_elements),
                       std::vector<double>(static_cast<std::size_t>(batch.tokens * kTopK))});
      for (std::int64_t pair = 0; pair < batch.tokens * kTopK; ++pair) add(all, batch, pair, ranks.back());
    }
  }

  // One (token, k).
  void add(const Shard& all, const Batch& batch, std::int64_t pair, OfRank& of) {
    const std::int64_t e = batch.routing.topk_ids[pair];
    const double weight = batch.routing.topk_weights[pair];
    const float* x = &batch.rows[pair / kTopK * kHidden];
    const float* g = &batch.grad_out[pair / kTopK * kHidden];
    double* sums = &of.sums[pair / kTopK * kHidden];
    double* d_x = &of.d_rows[pair / kTopK * kHidden];
    for (std::int64_t h = 0; h < kHidden; ++h) {
      sums[h] += weight * all.w2_bias[e * kHidden + h];
      of.d_topk_weights[pair] += double{g[h]} * all.w2_bias[e * kHidden + h];
      d_w2_bias[e * kHidden + h] += weight * g[h];
    }
    for (std::int64_t i = 0; i < kWidth; ++i) {
      const std::int64_t gate_row = e * 2 * kWidth + i;
      const std::int64_t up_row = gate_row + kWidth;
      double gate = all.w13_bias[gate_row];
      double up = all.w13_bias[up_row];
      for (std::int64_t h = 0; h < kHidden; ++h) {
        gate += double{all.w13[gate_row * kHidden + h]} * x[h];
        up += double{all.w13[up_row * kHidden + h]} * x[h];
      }
      const double sigmoid = 1 / (1 + std::exp(-gate));
      const double act = gate * sigmoid * up;
      double d_act = 0;
      for (std::int64_t h = 0; h < kHidden; ++h) {
        const double w2 = all.w2[(e * kHidden + h) * kWidth + i];
        sums[h] += weight * w2 * act;
        of.d_topk_weights[pair] += g[h] * w2 * act;
        d_w2[(e * kHidden + h) * kWidth + i] += weight * g[h] * act;
        d_act += weight * g[h] * w2;
      }
      const double d_up = d_act * gate * sigmoid;
      const double d_gate = d_act * up * (sigmoid + gate * sigmoid * (1 - sigmoid));
      d_w13_bias[gate_row] += d_gate;
      d_w13_bias[up_row] += d_up;
      for (std::int64_t h = 0; h < kHidden; ++h) {
        d_w13[gate_row * kHidden + h] += d_gate * x[h];
        d_w13[up_row * kHidden + h] += d_up * x[h];
        d_x[h] += d_gate * all.w13[gate_row * kHidden + h] + d_up * all.w13[up_row * kHidden + h];
      }
    }
  }
};

bool is_folded_here(Layout layout) { return layout == Layout::token_major || layout == Layout::rank_slots; }

// What one rank has of the loss sum(grad_out . sums): the sums of its tokens, and the gradients of its rows, weights and shard.
struct Result {
  std::vector<float> sums, d_rows, d_topk_weights;
  std::vector<float> d_w13, d_w2, d_w13_bias, d_w2_bias;
};

TensorView matrix(std::vector<float>& values, std::int64_t columns) {
  return {values.data(), Dtype::float32, {std::ssize(values) / columns, columns}};
}

// Dispatch, experts and combine in one layout, and all of it backwards.
Result through_experts(Exchange& exchange, const Batch& batch, const Shard& shard, Layout layout) {
  const Mode mode = layout == Layout::rank_slots ? Mode::latency : Mode::throughput;
  Received received = exchange.dispatch({.rows = {batch.rows.data(), Dtype::float32, {batch.tokens, kHidden}},
                                         .topk_ids = batch.routing.ids_view(),
                                         .topk_weights = batch.routing.weights_view()},
                                        {.layout = layout,
                                         .sizing = mode == Mode::latency ? Sizing::capacity : Sizing::exact,
                                         .mode = mode,
                                         .alignment = layout == Layout::expert_major ? 4 : 1});
  const RowGroups groups = RowGroups::of(received, static_cast<int>(shard.experts));
  const TensorView rows = received.rows();
  const std::int64_t num_rows = rows.num_elements() / kHidden;
  const ConstTensorView x(rows.data, Dtype::float32, {num_rows, kHidden});
  std::vector<float> y(static_cast<std::size_t>(groups.places * kHidden));
  ExpertActivations saved;
  experts_forward(x, groups, shard.weights(), {}, matrix(y, kHidden), &saved);
  const bool is_folded = is_folded_here(layout);
  const FoldInput fold = {matrix(y, kHidden), received.local_ids(), received.row_weights()};
  std::vector<float> folded(is_folded ? static_cast<std::size_t>(num_rows * kHidden) : 0);
  if (is_folded) unpermute(fold, groups, matrix(folded, kHidden));
  TensorView partials = rows;  // the same shape, other rows
  partials.data = is_folded ? folded.data() : y.data();
  const Weighting weighting = is_folded ? Weighting::none : Weighting::at_expert;
  const Combined combined = exchange.combine(partials, received.handle(), {.weighting = weighting});
  Result result;
  result.sums.assign(combined.out.as<float>(), combined.out.as<float>() + batch.tokens * kHidden);

  const CombineGradient d_partials = exchange.combine_backward(
      received.handle(), {batch.grad_out.data(), Dtype::float32, {batch.tokens, kHidden}}, partials, {.weighting = weighting});
  const ConstTensorView d_received(d_partials.rows.rows().data, Dtype::float32, {num_rows, kHidden});
  std::vector<float> d_y(y.size());
  std::vector<float> d_row_weights(is_folded ? static_cast<std::size_t>(received.local_ids().num_elements()) : 0);
  TensorView d_row_weights_view;
  if (is_folded) {
    d_row_weights_view = TensorView(d_row_weights.data(), Dtype::float32, {std::ssize(d_row_weights)});
    unpermute_backward(fold, groups, d_received, matrix(d_y, kHidden), d_row_weights_view);
    d_row_weights_view.ndim = received.row_weights().ndim;  // as dispatch shaped them
    d_row_weights_view.shape = received.row_weights().shape;
    d_row_weights_view.strides = received.row_weights().strides;
  }
  result.d_w13.resize(shard.w13.size());
  result.d_w2.resize(shard.w2.size());
  result.d_w13_bias.resize(shard.w13_bias.size());
  result.d_w2_bias.resize(shard.w2_bias.size());
  std::vector<float> d_places(y.size());
  const ExpertWeights w = shard.weights();
  const auto like = [](std::vector<float>& values, const ConstTensorView& view) {
    TensorView result(values.data(), Dtype::float32, {std::ssize(values)});
    result.ndim = view.ndim, result.shape = view.shape, result.strides = view.strides;
    return result;
  };
  experts_backward(
      {.x = x, .dy = is_folded ? ConstTensorView(matrix(d_y, kHidden)) : d_received, .saved = &saved}, groups, w, {},
      matrix(d_places, kHidden),
      {like(result.d_w13, w.w13), like(result.d_w2, w.w2), like(result.d_w13_bias, w.w13_bias), like(result.d_w2_bias, w.w2_bias)});
  std::vector<float> d_x(is_folded ? static_cast<std::size_t>(num_rows * kHidden) : 0);
  if (is_folded) unpermute({matrix(d_places, kHidden), received.local_ids(), {}}, groups, matrix(d_x, kHidden));
  partials.data = is_folded ? d_x.data() : d_places.data();
  const DispatchGradient gradient = exchange.dispatch_backward(received.handle(), partials, d_row_weights_view);
  result.d_rows.assign(gradient.rows.as<float>(), gradient.rows.as<float>() + batch.tokens * kHidden);
  const TensorView d_weights = is_folded ? gradient.topk_weights : d_partials.topk_weights;
  result.d_topk_weights.assign(d_weights.as<float>(), d_weights.as<float>() + batch.tokens * kTopK);
  return result;
}

void append(std::vector<float>& to, const std::vector<float>& from) { to.insert(to.end(), from.begin(), from.end()); }
void add_to(std::vector<float>& to, const std::vector<float>& from) {
  to.resize(from.size());
  std::transform(to.begin(), to.end(), from.begin(), to.begin(), std::plus<>());
}

// The whole batch at once, or in two micro-batches whose gradients add up.
Result in_micro_batches(Exchange& exchange, const Batch& batch, const Shard& shard, Layout layout, int micro_batches) {
  Result result;
  for (int part = 0; part < micro_batches; ++part) {
    const std::int64_t first = batch.tokens * part / micro_batches;
    const Batch micro_batch = part_of(batch, first, batch.tokens * (part + 1) / micro_batches - first);
    const Result of_part = through_experts(exchange, micro_batch, shard, layout);
    append(result.sums, of_part.sums);
    append(result.d_rows, of_part.d_rows);
    append(result.d_topk_weights, of_part.d_topk_weights);
    add_to(result.d_w13, of_part.d_w13);
    add_to(result.d_w2, of_part.d_w2);
    add_to(result.d_w13_bias, of_part.d_w13_bias);
    add_to(result.d_w2_bias, of_part.d_w2_bias);
  }
  return result;
}

void expect_close(const char* what, const std::vector<float>& values, const std::vector<double>& expected) {
  ASSERT_EQ(values.size(), expected.size()) << what;
  for (std::size_t i = 0; i < expected.size(); ++i)
    ASSERT_NEAR(values[i], expected[i], 1e-5 * (1 + std::abs(expected[i]))) << what << " " << i;
}

// A shard's gradient is its elements of the full gradient.
void expect_shard(ExpertTensor tensor, const Placement& placement, int rank, const std::vector<float>& values,
                  const std::vector<double>& full) {
  const ShardMap map = expert_shard(tensor, kShape, placement, rank);
  std::vector<double> expected;
  for (std::int64_t i = 0; i < map.local_elements(); ++i) expected.push_back(full[static_cast<std::size_t>(map.global_index(i))]);
  expect_close(name(tensor).data(), {values.begin(), values.begin() + map.local_elements()}, expected);
}

// Replicas share their expert's tokens, so that each has a part of its gradient only.
enum class Replicated : bool { no, yes };

void expect_single_process_answer(World& world, const Placement& placement, Replicated replicated = Replicated::no) {
  const SingleProcess whole(world.size());
  const Shard mine(placement, world.rank());
  const Batch batch = batch_of(world.rank());
  for (const Layout layout : {Layout::token_major, Layout::expert_major, Layout::expert_padded, Layout::rank_slots}) {
    SCOPED_TRACE(name(layout));
    Exchange exchange(world, {.max_tokens_per_rank = kTokens,
                              .max_row_bytes = kHidden * 4,
                              .top_k = kTopK,
                              .max_local_experts = placement.max_local_experts(),
                              .max_fanout = placement.max_fanout(),
                              .mode = layout == Layout::rank_slots ? Mode::latency : Mode::throughput});
    exchange.add(placement);
    for (const int micro_batches : {1, 2}) {
      const Result result = in_micro_batches(exchange, batch, mine, layout, micro_batches);
      const SingleProcess::OfRank& expected = whole.ranks[world.rank()];
      expect_close("sums", result.sums, expected.sums);
      expect_close("d_rows", result.d_rows, expected.d_rows);
      expect_close("d_topk_weights", result.d_topk_weights, expected.d_topk_weights);
      if (replicated == Replicated::yes) continue;
      expect_shard(ExpertTensor::w13, placement, world.rank(), result.d_w13, whole.d_w13);
      expect_shard(ExpertTensor::w2, placement, world.rank(), result.d_w2, whole.d_w2);
      expect_shard(ExpertTensor::w13_bias, placement, world.rank(), result.d_w13_bias, whole.d_w13_bias);
      expect_shard(ExpertTensor::w2_bias, placement, world.rank(), result.d_w2_bias, whole.d_w2_bias);
    }
  }
}

TEST(ExpertsOnRanks, EveryConfigurationGivesTheSingleProcessAnswer) {
  // The last one sends every row to top_k * tp = 36 places; shards of width 1.
  for (const auto& [ep, tp] : {std::pair{1, 1}, {2, 1}, {1, 2}, {2, 2}, {4, 1}, {1, 4}, {2, 4}, {4, 2}, {8, 1}, {1, 12}}) {
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
  run_ranks(4, [&](World& world) { expect_single_process_answer(world, placement, Replicated::yes); });
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
