// Gradients against finite differences of naive formulas in float64, and the losses against those formulas.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "tokenyard/routing.h"
#include "unit/expect_usage_error.h"
#include "unit/seeded_random.h"

namespace tokenyard {
namespace {

using testing::expect_usage_error;

// Naive: no code, order or precision shared with the library. Experts whose logit is not finite do not exist.
namespace naive {

std::vector<double> softmax(const std::vector<double>& x) {
  double sum = 0;
  for (const double value : x) sum += std::isfinite(value) ? std::exp(value) : 0.0;
  std::vector<double> result;
  for (const double value : x) result.push_back(std::isfinite(value) ? std::exp(value) / sum : 0.0);
  return result;
}

std::vector<double> scores(const Gate& gate, const std::vector<double>& x) {
  const bool is_sigmoid = gate.kind == GateKind::sigmoid ||
                          ((gate.kind == GateKind::bias_corrected || gate.kind == GateKind::per_group) && gate.score == Score::sigmoid);
  if (!is_sigmoid) return softmax(x);
  std::vector<double> result;
  for (const double value : x) result.push_back(std::isfinite(value) ? 1 / (1 + std::exp(-value)) : 0.0);
  return result;
}

// sum_k g_k w_k of one token with fixed ids.
double weighted(const Gate& gate, const std::vector<double>& x, const std::vector<std::int64_t>& ids, const std::vector<double>& g) {
  const std::vector<double> s = scores(gate, x);
  double sum = 0;
  double total = 0;
  for (std::size_t k = 0; k < ids.size(); ++k) {
    if (ids[k] < 0) continue;
    sum += s[ids[k]];
    total += g[k] * s[ids[k]];
  }
  return gate.scale * (gate.renormalise ? total / (sum + gate.epsilon) : total);
}

}  // namespace naive

struct Batch {
  std::int64_t tokens = 0;
  int experts = 0;
  std::vector<float> logits, bias;
  std::vector<std::uint8_t> mask;
  RoutingInput input(const Gate& gate) const {
    RoutingInput in = {.logits = {logits.data(), Dtype::float32, {tokens, experts}}, .mask = {mask.data(), Dtype::uint8, {tokens}}};
    if (gate.kind == GateKind::bias_corrected) in.bias = {bias.data(), Dtype::float32, {experts}};
    return in;
  }
  bool counts(std::int64_t t) const {
    for (int e = 0; e < experts; ++e) {
      if (mask[t] != 0 && std::isfinite(logits[t * experts + e])) return true;
    }
    return false;
  }
  std::vector<double> row(std::int64_t t) const { return {logits.begin() + t * experts, logits.begin() + (t + 1) * experts}; }
};

Batch random_batch(testing::SeededRandom& random, std::int64_t tokens, int experts) {
  Batch batch{tokens, experts, {}, {}, {}};
  for (std::int64_t i = 0; i < tokens * experts; ++i) {
    const bool is_odd = random.one_in(25);
    const float odd = random.pick({std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()});
    batch.logits.push_back(is_odd ? odd : static_cast<float>(random.between(-40000, 40000)) / 10000.0F);
  }
  for (int e = 0; e < experts; ++e) batch.bias.push_back(static_cast<float>(random.between(-100, 100)) / 200.0F);
  for (std::int64_t t = 0; t < tokens; ++t) batch.mask.push_back(random.one_in(7) ? 0 : 1);
  return batch;
}

// d f / d x by central differences.
std::vector<double> differences(const std::vector<double>& x, const std::function<double(const std::vector<double>&)>& f) {
  constexpr double kStep = 1e-5;
  std::vector<double> result;
  for (std::size_t i = 0; i < x.size(); ++i) {
    std::vector<double> more = x;
    std::vector<double> less = x;
    more[i] += kStep;
    less[i] -= kStep;
    result.push_back((f(more) - f(less)) / (2 * kStep));
  }
  return result;
}

std::vector<Gate> all_gates(float scale) {
  std::vector<Gate> gates;
  for (const bool renormalise : {false, true}) {
    gates.push_back(Gate::softmax(4, renormalise, scale));
    gates.push_back(Gate::sigmoid(4, renormalise, scale, 0.25F));
    gates.push_back(Gate::grouped_max(4, 4, 2, renormalise, scale));
    for (const Score score : {Score::softmax, Score::sigmoid}) {
      gates.push_back(Gate::bias_corrected(4, score, 4, 2, renormalise, scale));
      gates.push_back(Gate::per_group(4, 2, score, renormalise, scale));
    }
  }
  return gates;
}

std::string describe(const Gate& gate) {
  return "kind " + std::to_string(static_cast<int>(gate.kind)) + " score " + std::to_string(static_cast<int>(gate.score)) +
         (gate.renormalise ? " renormalised" : "");
}

void expect_close(const std::vector<float>& values, std::int64_t first, const std::vector<double>& expected, double size) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(values[static_cast<std::size_t>(first) + i], expected[i], 2e-6 * size) << "expert " << i;
  }
}

// With the routing's own choice, and with a replay that repeats ids and leaves some out.
TEST(RoutingTraining, GradientsOfWeightsAreThoseOfFiniteDifferences) {
  testing::SeededRandom random;
  for (const Gate& gate : all_gates(2.5F)) {
    for (const bool is_replay : {false, true}) {
      SCOPED_TRACE(describe(gate) + (is_replay ? " replay" : ""));
      const Batch batch = random_batch(random, 9, 16);
      RoutingInput input = batch.input(gate);
      std::vector<std::int64_t> given;
      for (int i = 0; i < 9 * 4; ++i) given.push_back(random.between(-1, 15));
      if (is_replay) input.given_ids = {given.data(), Dtype::int64, {9, 4}};
      const Routing routing = route(input, gate);
      std::vector<float> d_weights;
      for (int i = 0; i < 9 * 4; ++i) d_weights.push_back(static_cast<float>(random.between(-1000, 1000)) / 500.0F);
      std::vector<float> d_logits(9 * 16, 1.0F);  // added to
      add_weights_gradient(input, gate, routing, {d_weights.data(), Dtype::float32, {9, 4}}, {d_logits.data(), Dtype::float32, {9, 16}});
      for (std::int64_t t = 0; t < 9; ++t) {
        const std::vector<std::int64_t> ids(routing.topk_ids.begin() + t * 4, routing.topk_ids.begin() + t * 4 + 4);
        const std::vector<double> g(d_weights.begin() + t * 4, d_weights.begin() + t * 4 + 4);
        const bool is_any = batch.counts(t) && std::any_of(ids.begin(), ids.end(), [&](std::int64_t id) {
                              return id >= 0 && std::isfinite(batch.logits[static_cast<std::size_t>(t * 16 + id)]);
                            });
        std::vector<double> expected(16, 0.0);
        if (is_any) expected = differences(batch.row(t), [&](const auto& x) { return naive::weighted(gate, x, ids, g); });
        for (double& value : expected) value += 1;
        expect_close(d_logits, t * 16, expected, 10);
      }
    }
  }
}

// The whole batch's losses as functions of its logits, with the choice fixed.
double naive_balance(const Batch& batch, const Gate& gate, const std::vector<double>& x, const std::vector<std::int64_t>& load,
                     double alpha) {
  double pairs = 0;
  double tokens = 0;
  for (const std::int64_t count : load) pairs += static_cast<double>(count);
  std::vector<double> mean(load.size(), 0.0);
  for (std::int64_t t = 0; t < batch.tokens; ++t) {
    if (!batch.counts(t)) continue;
    const std::vector<double> p = naive::scores(gate, {x.begin() + t * batch.experts, x.begin() + (t + 1) * batch.experts});
    double sum = 0;
    for (const double value : p) sum += value;
    for (std::size_t e = 0; e < p.size(); ++e) mean[e] += p[e] / sum;
    ++tokens;
  }
  double loss = 0;
  for (std::size_t e = 0; e < mean.size(); ++e) loss += static_cast<double>(load[e]) * mean[e] / tokens;
  return pairs == 0 ? 0 : alpha * batch.experts / pairs * loss;
}

double naive_z(const Batch& batch, const std::vector<double>& x, double alpha) {
  double sum = 0;
  double tokens = 0;
  for (std::int64_t t = 0; t < batch.tokens; ++t) {
    if (!batch.counts(t)) continue;
    double exponentials = 0;
    for (int e = 0; e < batch.experts; ++e) {
      const double value = x[static_cast<std::size_t>(t * batch.experts + e)];
      exponentials += std::isfinite(value) ? std::exp(value) : 0.0;
    }
    sum += std::log(exponentials) * std::log(exponentials);
    ++tokens;
  }
  return alpha * sum / tokens;
}

TEST(RoutingTraining, LossesAndTheirGradients) {
  testing::SeededRandom random;
  for (const Gate& gate : all_gates(1.0F)) {
    SCOPED_TRACE(describe(gate));
    Batch batch = random_batch(random, 7, 16);
    batch.mask[3] = 1;
    batch.logits[3 * 16] = 0.5F;
    const RoutingInput input = batch.input(gate);
    const Routing routing = route(input, gate);
    const GateStatistics statistics = gate_statistics(input, gate, routing);
    const std::vector<double> x(batch.logits.begin(), batch.logits.end());
    EXPECT_NEAR(balance_loss(statistics, 0.3), naive_balance(batch, gate, x, routing.load, 0.3), 1e-6);
    EXPECT_NEAR(z_loss(statistics, 0.2), naive_z(batch, x, 0.2), 1e-5);
    std::vector<float> d_logits(7 * 16, 0.0F);
    add_balance_gradient(input, gate, statistics, 0.3, {d_logits.data(), Dtype::float32, {7, 16}});
    expect_close(d_logits, 0, differences(x, [&](const auto& y) { return naive_balance(batch, gate, y, routing.load, 0.3); }), 1);
    std::fill(d_logits.begin(), d_logits.end(), 0.0F);
    add_z_gradient(input, gate, statistics, 0.2, {d_logits.data(), Dtype::float32, {7, 16}});
    expect_close(d_logits, 0, differences(x, [&](const auto& y) { return naive_z(batch, y, 0.2); }), 1);
  }
}

// A perfectly even batch of a softmax gate: E / sum c * sum_e c_e p_e = 1.
TEST(RoutingTraining, EvenRoutingHasBalanceLossAlpha) {
  std::vector<float> logits(8 * 8, 0.0F);
  for (int t = 0; t < 8; ++t) logits[t * 8 + t] = 2.0F;
  const RoutingInput input = {.logits = {logits.data(), Dtype::float32, {8, 8}}};
  const Gate gate = Gate::softmax(1, false);
  EXPECT_NEAR(balance_loss(gate_statistics(input, gate, route(input, gate)), 0.01), 0.01, 1e-8);
}

// Statistics of the parts of a batch add up to those of the batch, and each part's gradient is its rows of the whole one.
TEST(RoutingTraining, AGroupIsOneBatch) {
  testing::SeededRandom random;
  const Gate gate = Gate::bias_corrected(4, Score::sigmoid, 4, 2, true, 2.5F);
  const Batch batch = random_batch(random, 10, 16);
  const RoutingInput whole = batch.input(gate);
  const auto part = [&](std::int64_t first, std::int64_t count) {
    RoutingInput input = whole;
    input.logits = {batch.logits.data() + first * 16, Dtype::float32, {count, 16}};
    input.mask = {batch.mask.data() + first, Dtype::uint8, {count}};
    return input;
  };
  const GateStatistics expected = gate_statistics(whole, gate, route(whole, gate));
  GateStatistics sum = gate_statistics(part(0, 4), gate, route(part(0, 4), gate));
  sum.add(gate_statistics(part(4, 0), gate, route(part(4, 0), gate)));
  sum.add(gate_statistics(part(4, 6), gate, route(part(4, 6), gate)));
  EXPECT_EQ(sum.load, expected.load);
  EXPECT_EQ(sum.num_tokens, expected.num_tokens);
  EXPECT_NEAR(balance_loss(sum, 1), balance_loss(expected, 1), 1e-12);
  EXPECT_NEAR(z_loss(sum, 1), z_loss(expected, 1), 1e-12);
  std::vector<float> d_whole(10 * 16, 0.0F);
  std::vector<float> d_parts(10 * 16, 0.0F);
  add_balance_gradient(whole, gate, expected, 1, {d_whole.data(), Dtype::float32, {10, 16}});
  add_balance_gradient(part(0, 4), gate, expected, 1, {d_parts.data(), Dtype::float32, {4, 16}});
  add_balance_gradient(part(4, 6), gate, expected, 1, {d_parts.data() + 4 * 16, Dtype::float32, {6, 16}});
  EXPECT_EQ(d_parts, d_whole);
}

TEST(RoutingTraining, NothingRoutedIsNoLossAndNoGradient) {
  const std::vector<float> logits(2 * 4, std::numeric_limits<float>::quiet_NaN());
  const RoutingInput input = {.logits = {logits.data(), Dtype::float32, {2, 4}}};
  const Gate gate = Gate::softmax(2, true);
  const Routing routing = route(input, gate);
  const GateStatistics statistics = gate_statistics(input, gate, routing);
  EXPECT_EQ(statistics.num_tokens, 0);
  EXPECT_EQ(balance_loss(statistics, 1), 0);
  EXPECT_EQ(z_loss(statistics, 1), 0);
  std::vector<float> d_logits(2 * 4, 0.0F);
  const TensorView view(d_logits.data(), Dtype::float32, {2, 4});
  const std::vector<float> d_weights(2 * 2, 1.0F);
  add_weights_gradient(input, gate, routing, {d_weights.data(), Dtype::float32, {2, 2}}, view);
  add_balance_gradient(input, gate, statistics, 1, view);
  add_z_gradient(input, gate, statistics, 1, view);
  EXPECT_EQ(d_logits, std::vector<float>(2 * 4, 0.0F));
}

// Extreme logits: no NaN, no infinity.
TEST(RoutingTraining, ExtremeLogitsHaveFiniteGradients) {
  for (const Gate& gate : all_gates(1.0F)) {
    std::vector<float> logits(16, -1e30F);
    logits[1] = 1e30F;
    logits[2] = -200;
    const std::vector<float> bias(16, 0.0F);
    RoutingInput input = {.logits = {logits.data(), Dtype::float32, {1, 16}}};
    if (gate.kind == GateKind::bias_corrected) input.bias = {bias.data(), Dtype::float32, {16}};
    const Routing routing = route(input, gate);
    const GateStatistics statistics = gate_statistics(input, gate, routing);
    std::vector<float> d_logits(16, 0.0F);
    const std::vector<float> d_weights = {1, -2, 3, 4};
    const TensorView view(d_logits.data(), Dtype::float32, {1, 16});
    add_weights_gradient(input, gate, routing, {d_weights.data(), Dtype::float32, {1, 4}}, view);
    add_balance_gradient(input, gate, statistics, 1, view);
    for (const float d : d_logits) EXPECT_TRUE(std::isfinite(d)) << describe(gate);
  }
}

TEST(RoutingTraining, BiasMovesTowardsTheMean) {
  std::vector<float> bias = {0, 0, 0, 1};
  update_gate_bias(bias, std::vector<std::int64_t>{5, 3, 4, 4}, 0.5F);
  EXPECT_EQ(bias, (std::vector<float>{-0.5F, 0.5F, 0, 1}));
  // A mean between integers: nobody is at it.
  update_gate_bias(bias, std::vector<std::int64_t>{0, 0, 0, 1}, 1.0F);
  EXPECT_EQ(bias, (std::vector<float>{0.5F, 1.5F, 1, 0}));
  testing::SeededRandom random;
  std::vector<std::int64_t> load;
  for (int e = 0; e < 100; ++e) load.push_back(random.between(0, 9));
  double mean = 0;
  for (const std::int64_t count : load) mean += static_cast<double>(count) / 100;
  std::vector<float> many(100, 0.0F);
  update_gate_bias(many, load, 1.0F);
  for (int e = 0; e < 100; ++e) {
    const double excess = static_cast<double>(load[e]) - mean;
    EXPECT_EQ(many[e], std::abs(excess) < 1e-9 ? 0.0F : excess > 0 ? -1.0F : 1.0F);
  }
}

TEST(RoutingTraining, Errors) {
  const std::vector<float> logits(2 * 4, 0.0F);
  const RoutingInput input = {.logits = {logits.data(), Dtype::float32, {2, 4}}};
  const Gate gate = Gate::softmax(2, true);
  const Routing routing = route(input, gate);
  std::vector<float> d_logits(2 * 4);
  const TensorView out(d_logits.data(), Dtype::float32, {2, 4});
  const ConstTensorView d_weights(logits.data(), Dtype::float32, {2, 2});
  expect_usage_error(
      [&] {
        add_weights_gradient(input, gate, routing, {logits.data(), Dtype::float32, {2, 3}}, out);
      },
      {"d_weights is [2, 3] float32", "[2, 2] float32"});
  expect_usage_error(
      [&] {
        add_weights_gradient(input, gate, routing, d_weights, {d_logits.data(), Dtype::bfloat16, {2, 4}});
      },
      {"d_logits is [2, 4] bfloat16"});
  Routing other = routing;
  other.topk_ids.pop_back();
  expect_usage_error([&] { add_weights_gradient(input, gate, other, d_weights, out); }, {"the routing has 3 ids", "need 4"});
  other = routing;
  other.topk_ids[1] = 4;
  expect_usage_error([&] { gate_statistics(input, gate, other); }, {"id 4", "num_experts = 4"});
  GateStatistics statistics = gate_statistics(input, gate, routing);
  statistics.load.pop_back();
  expect_usage_error([&] { add_z_gradient(input, gate, statistics, 1, out); }, {"statistics are of 3 experts"});
  expect_usage_error([&] { statistics.add(gate_statistics(input, gate, routing)); }, {"3 and 4 experts"});
  std::vector<float> bias(3);
  expect_usage_error([&] { update_gate_bias(bias, routing.load, 1); }, {"bias has 3 entries and load 4"});
}

}  // namespace
}  // namespace tokenyard
