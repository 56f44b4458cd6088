// Residual + RMSNorm with its collectives, and a whole decoder layer: attention's partial sums in, the next norm's rows out.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "layer/harness.h"
#include "tokenyard/norm.h"
#include "unit/expect_usage_error.h"

namespace tokenyard::testing {
namespace {

constexpr std::int64_t kHidden = 16;
constexpr float kEpsilon = 1e-3F;

struct Normed {
  Values residual, out;
};
// One row.
Normed naive_norm(const Values& x, const Values& residual, const Values& bias, const Values& weight) {
  Normed result;
  double squares = 0;
  for (std::size_t h = 0; h < x.size(); ++h) {
    result.residual.push_back(x[h] + residual[h] + bias[h]);
    squares += result.residual.back() * result.residual.back();
  }
  for (std::size_t h = 0; h < x.size(); ++h)
    result.out.push_back(result.residual[h] * weight[h] / std::sqrt(squares / static_cast<double>(x.size()) + kEpsilon));
  return result;
}

Values row_of(const Values& values, std::int64_t row) { return {values.begin() + row * kHidden, values.begin() + (row + 1) * kHidden}; }
void append(Values& to, const Values& from) { to.insert(to.end(), from.begin(), from.end()); }

struct Slice {
  std::vector<std::int64_t> counts;
  std::int64_t begin = 0, count = 0;
  Slice(std::int64_t tokens, const World& world) : counts(slice_counts(tokens, world.size())) {
    for (int r = 0; r < world.rank(); ++r) begin += counts[r];
    count = counts[world.rank()];
  }
  Values of(const Values& values) const { return {values.begin() + begin * kHidden, values.begin() + (begin + count) * kHidden}; }
};

TEST(Norm, SlicesDifferByAtMostOne) {
  EXPECT_EQ(slice_counts(10, 4), (std::vector<std::int64_t>{3, 3, 2, 2}));
  EXPECT_EQ(slice_counts(2, 4), (std::vector<std::int64_t>{1, 1, 0, 0}));
  EXPECT_EQ(slice_counts(0, 2), (std::vector<std::int64_t>{0, 0}));
  EXPECT_THROW(slice_counts(-1, 2), UsageError);
}

TEST(Norm, BackwardIsTheCentralDifference) {
  const Values x = drawn("x", 3 * kHidden, 1), d_out = drawn("d_out", 3 * kHidden, 1), d_residual = drawn("d_residual", 3 * kHidden, 1);
  Values weight = drawn("weight", kHidden, 1);
  const Tensor r(Dtype::float32, x, {3, kHidden}), w(Dtype::float32, weight, {kHidden});
  const Tensor d_w = Tensor::zeros(Dtype::float32, {kHidden});
  const Tensor d(Dtype::float32, d_residual, {3, kHidden});
  residual_norm_backward({r.view(), d.view(), Tensor(Dtype::float32, d_out, {3, kHidden}).view()}, {w.view(), kEpsilon}, d.view(),
                         d_w.view());
  const auto loss = [&](std::int64_t row, const Values& of_row) {
    const Normed normed = naive_norm(of_row, Values(kHidden), Values(kHidden), weight);
    double sum = 0;
    for (std::int64_t h = 0; h < kHidden; ++h)
      sum += normed.out[h] * d_out[row * kHidden + h] + normed.residual[h] * d_residual[row * kHidden + h];
    return sum;
  };
  const Values d_x = d.values(), d_weight = d_w.values();
  for (std::int64_t i = 0; i < 3 * kHidden; ++i) {
    Values above = row_of(x, i / kHidden), below = above;
    above[i % kHidden] += 1e-5, below[i % kHidden] -= 1e-5;
    EXPECT_NEAR(d_x[i], (loss(i / kHidden, above) - loss(i / kHidden, below)) / 2e-5, 2e-5) << i;
  }
  for (std::int64_t h = 0; h < kHidden; ++h) {
    double sums[2] = {0, 0};
    for (const int side : {0, 1}) {
      const double value = weight[h];
      weight[h] += side == 0 ? 1e-5 : -1e-5;
      for (std::int64_t row = 0; row < 3; ++row) sums[side] += loss(row, row_of(x, row));
      weight[h] = value;
    }
    EXPECT_NEAR(d_weight[h], (sums[0] - sums[1]) / 2e-5, 2e-5) << h;
  }
}

// What forward leaves of its sums gives backward the same bits as sums of its own.
TEST(Norm, BackwardTakesTheInverseOfForward) {
  const Tensor x(Dtype::bfloat16, drawn("x", 3 * kHidden, 1), {3, kHidden}), w(Dtype::float32, drawn("weight", kHidden, 1), {kHidden});
  const Tensor d_out(Dtype::bfloat16, drawn("d_out", 3 * kHidden, 1), {3, kHidden});
  const Tensor kept = Tensor::zeros(Dtype::bfloat16, {3, kHidden}), out = Tensor::zeros(Dtype::bfloat16, {3, kHidden});
  const Tensor inverse = Tensor::zeros(Dtype::float32, {3});
  residual_norm({x.view(), {}, {}}, {w.view(), kEpsilon}, {kept.view(), out.view(), inverse.view()});
  Values found[2];
  for (const bool is_given : {false, true}) {
    const Tensor d_x = Tensor::zeros(Dtype::bfloat16, {3, kHidden}), d_w = Tensor::zeros(Dtype::float32, {kHidden});
    const NormGradient input = {kept.view(), {}, d_out.view(), is_given ? inverse.view() : TensorView()};
    residual_norm_backward(input, {w.view(), kEpsilon}, d_x.view(), d_w.view());
    found[is_given] = d_x.values();
    append(found[is_given], d_w.values());
  }
  EXPECT_EQ(found[0], found[1]);
  std::fill_n(inverse.view().as<float>(), 3, 0.0F);
  const Tensor d_x = Tensor::zeros(Dtype::bfloat16, {3, kHidden});
  residual_norm_backward({kept.view(), {}, d_out.view(), inverse.view()}, {w.view(), kEpsilon}, d_x.view(), {});
  EXPECT_EQ(d_x.values(), Values(3 * kHidden)) << "it is used";
}

// Reduce-scatter + norm, then norm + all-gather, forward and backward, with slices that may be empty.
void expect_fused(World& world, std::int64_t tokens) {
  const int rank = world.rank();
  const auto collectives = Collectives::create(world);
  const Slice slice(tokens, world);
  const auto partial_of = [&](int r) { return drawn("partial " + std::to_string(r), tokens * kHidden, 1); };
  const Values residual = drawn("residual", tokens * kHidden, 1), bias = drawn("bias", kHidden, 1), weight = drawn("weight", kHidden, 1);
  Values sums(residual.size()), expected_residual, expected;
  for (int r = 0; r < world.size(); ++r) {
    const Values partial = partial_of(r);
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += partial[i];
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    const Normed normed = naive_norm(row_of(sums, t), row_of(residual, t), bias, weight);
    append(expected_residual, normed.residual), append(expected, normed.out);
  }
  const Tensor w(Dtype::float32, weight, {kHidden}), b(Dtype::float32, bias, {kHidden});
  const RmsNorm norm = {w.view(), kEpsilon};
  const Tensor x(Dtype::float32, partial_of(rank), {tokens, kHidden});
  const Tensor r(Dtype::float32, slice.of(residual), {slice.count, kHidden});
  const Tensor out = Tensor::zeros(Dtype::float32, {slice.count, kHidden});
  reduce_scatter_norm(*collectives, {x.view(), r.view(), b.view()}, norm, {r.view(), out.view()});  // the residual in place
  expect_close("residual", r.values(), slice.of(expected_residual), 1e-5);
  expect_close("out", out.values(), slice.of(expected), 1e-5);

  // The same rows, as a slice that is added to no residual, gathered.
  const Tensor all = Tensor::zeros(Dtype::float32, {tokens, kHidden});
  const Tensor same = Tensor::zeros(Dtype::float32, {slice.count, kHidden});
  norm_all_gather(*collectives, {r.view(), {}, {}}, norm, {same.view(), all.view()});
  EXPECT_EQ(same.values(), r.values());
  expect_close("gathered", all.values(), expected, 1e-5);

  // Backward: what each rank makes of the gathered rows is summed before the norm; of the partial sums all get the same gradient.
  Values d_sum(residual.size());
  for (int from = 0; from < world.size(); ++from) {
    const Values d = drawn("d " + std::to_string(from), tokens * kHidden, 1);
    for (std::size_t i = 0; i < d_sum.size(); ++i) d_sum[i] += d[i];
  }
  const Tensor d_all(Dtype::float32, drawn("d " + std::to_string(rank), tokens * kHidden, 1), {tokens, kHidden});
  const Tensor d_slice = Tensor::zeros(Dtype::float32, {slice.count, kHidden}), expected_d = d_slice;
  norm_all_gather_backward(*collectives, {r.view(), {}, d_all.view()}, norm, d_slice.view(), {});
  const Tensor whole_r(Dtype::float32, expected_residual, {tokens, kHidden}), whole_d = Tensor::zeros(Dtype::float32, {tokens, kHidden});
  residual_norm_backward({whole_r.view(), {}, Tensor(Dtype::float32, d_sum, {tokens, kHidden}).view()}, norm, whole_d.view(), {});
  expect_close("d of the slice", d_slice.values(), slice.of(whole_d.values()), 1e-4);

  const Tensor d_residual = Tensor::zeros(Dtype::float32, {slice.count, kHidden});
  const Tensor d_partial = Tensor::zeros(Dtype::float32, {tokens, kHidden});
  const Tensor d_out(Dtype::float32, slice.of(d_sum), {slice.count, kHidden});
  reduce_scatter_norm_backward(*collectives, {r.view(), {}, d_out.view()}, norm, {d_residual.view(), d_partial.view()}, {});
  expect_close("d of partial sums", d_partial.values(), whole_d.values(), 1e-4);
  expect_close("d of the residual", d_residual.values(), slice.of(whole_d.values()), 1e-4);
}

TEST(Norm, WithItsCollectives) {
  for (const int ranks : {1, 2, 4}) {
    for (const std::int64_t tokens : {0, 1, 3, 10}) {
      SCOPED_TRACE(std::to_string(ranks) + " ranks, " + std::to_string(tokens) + " tokens");
      run_ranks(ranks, [&](World& world) { expect_fused(world, tokens); });
    }
  }
}

// Rank 0 refuses its call: the other learns why at once, and the next call is fine.
TEST(Norm, ARefusedCallIsToldToPeers) {
  run_ranks(2, [](World& world) {
    const auto collectives = Collectives::create(world);
    const Tensor w(Dtype::float32, drawn("weight", kHidden, 1), {kHidden}), x(Dtype::float32, drawn("x", kHidden, 1), {1, kHidden});
    const Tensor kept = Tensor::zeros(Dtype::float32, {1, kHidden}), all = Tensor::zeros(Dtype::float32, {2, kHidden});
    const RmsNorm none = {};
    if (world.rank() == 0) {
      expect_usage_error([&] { norm_all_gather(*collectives, {x.view(), {}, {}}, none, {kept.view(), all.view()}); }, {"has no weight"});
    } else {
      try {
        norm_all_gather(*collectives, {x.view(), {}, {}}, {w.view(), kEpsilon}, {kept.view(), all.view()});
        ADD_FAILURE() << "rank 1 was told nothing";
      } catch (const TransportError& error) {
        EXPECT_EQ(error.failure().kind, FailureKind::aborted);
        EXPECT_NE(error.failure().detail.find("has no weight"), std::string::npos) << error.what();
      }
    }
    norm_all_gather(*collectives, {x.view(), {}, {}}, {w.view(), kEpsilon}, {kept.view(), all.view()});
    EXPECT_EQ(row_of(all.values(), 0), row_of(all.values(), 1));
  });
}

// attention -> reduce-scatter -> residual + norm -> MoE layer on the slice -> residual + norm -> all-gather, on attn_dp x attn_tp ranks
// that are ep x mlp_tp for the experts. Each attention group has its own tokens; some ranks' slices are empty.
void expect_decoder_layer(World& world, const ParallelConfig& config, const LayerCase& c) {
  const Model model(c.sizes);
  auto group = std::make_shared<ExpertGroup>(world, config, group_options(c));
  const SplitArguments at = config.split_arguments(SubWorld::attention, world.rank());
  const World attention = *world.split(at.color, at.key);
  const auto collectives = Collectives::create(attention);
  const std::int64_t tokens = at.color == 0 ? 7 : 1;
  const std::string of = " of group " + std::to_string(at.color);
  const Slice slice(tokens, attention);
  const Values residual = drawn("residual" + of, tokens * kHidden, 1);
  const Values before = drawn("norm before", kHidden, 1), after = drawn("norm after", kHidden, 1), none(kHidden);
  Values sums(residual.size());
  for (int r = 0; r < attention.size(); ++r) {
    const Values partial = drawn("partial" + of + std::to_string(r), tokens * kHidden, 0.5);
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += partial[i];
  }

  const RankWeights weights = weights_of(model, *group, c);
  MoeLayer layer(group, weights.views(), layer_options(c));
  const Tensor w_before(Dtype::float32, before, {kHidden}), w_after(Dtype::float32, after, {kHidden});
  const Tensor x(Dtype::float32, drawn("partial" + of + std::to_string(attention.rank()), tokens * kHidden, 0.5), {tokens, kHidden});
  const Tensor stream(Dtype::float32, slice.of(residual), {slice.count, kHidden});
  const Tensor rows = Tensor::zeros(Dtype::float32, {slice.count, kHidden}), moe = Tensor::zeros(Dtype::float32, {slice.count, kHidden});
  const Tensor next = Tensor::zeros(Dtype::float32, {tokens, kHidden});
  reduce_scatter_norm(*collectives, {x.view(), stream.view(), {}}, {w_before.view(), kEpsilon}, {stream.view(), rows.view()});
  layer.forward(rows.view(), moe.view(), {.mode = mode_for_step(7)});
  norm_all_gather(*collectives, {moe.view(), stream.view(), {}}, {w_after.view(), kEpsilon}, {stream.view(), next.view()});

  Values expected, expected_stream;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const Normed first = naive_norm(row_of(sums, t), row_of(residual, t), none, before);
    const Normed second = naive_norm(model.forward(first.out.data()), first.residual, none, after);
    append(expected_stream, second.residual), append(expected, second.out);
  }
  expect_close("stream", stream.values(), slice.of(expected_stream), c.tolerance);
  expect_close("next", next.values(), expected, c.tolerance);
}

TEST(DecoderLayer, FromPartialSumsToGatheredRows) {
  for (const ExpertTp expert_tp : {ExpertTp::virtual_experts, ExpertTp::gathered}) {
    for (const Flavour flavour : {Flavour::qwen, Flavour::deepseek}) {
      const LayerCase c = {.sizes = {.flavour = flavour}, .ep = 2, .tp = 2, .expert_tp = expert_tp};
      SCOPED_TRACE(c.describe());
      const ParallelConfig config = solve_parallel({.dp = 2, .ep = 2, .attn_tp = 2, .mlp_tp = 2});
      run_ranks(4, [&](World& world) { expect_decoder_layer(world, config, c); });
    }
  }
}

}  // namespace
}  // namespace tokenyard::testing
