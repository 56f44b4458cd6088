// Answers worked out by hand. Where a weight is written as an expression, it is the definition in spec order.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tokenyard/routing.h"

namespace tokenyard {
namespace {

using Ids = std::vector<std::int64_t>;
using Floats = std::vector<float>;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

ConstTensorView matrix(const Floats& values, std::int64_t columns) {
  return {values.data(), Dtype::float32, {std::ssize(values) / columns, columns}};
}

Routing route_row(const Floats& logits, const Gate& gate, const Floats& bias = {}) {
  RoutingInput input{.logits = matrix(logits, std::ssize(logits))};
  if (!bias.empty()) input.bias = {bias.data(), Dtype::float32, {std::ssize(bias)}};
  return route(input, gate);
}

void expect_weights(const Floats& weights, const std::vector<double>& expected) {
  ASSERT_EQ(weights.size(), expected.size());
  for (std::size_t k = 0; k < expected.size(); ++k) EXPECT_NEAR(weights[k], expected[k], 1e-6) << "slot " << k;
}

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

TEST(RoutingKnown, Softmax) {
  const Floats logits = {std::log(1.0F), std::log(4.0F), std::log(3.0F), std::log(2.0F)};  // probabilities 0.1 0.4 0.3 0.2
  const Routing plain = route_row(logits, Gate::softmax(2, false));
  EXPECT_EQ(plain.topk_ids, (Ids{1, 2}));
  expect_weights(plain.topk_weights, {0.4, 0.3});
  expect_weights(route_row(logits, Gate::softmax(2, true)).topk_weights, {4.0 / 7, 3.0 / 7});
  expect_weights(route_row(logits, Gate::softmax(2, true, 2.5F)).topk_weights, {10.0 / 7, 7.5 / 7});
  EXPECT_EQ(plain.load, (std::vector<std::int64_t>{0, 1, 1, 0}));
  EXPECT_EQ(plain.num_tokens(), 1);
}

TEST(RoutingKnown, SoftmaxIsStable) {
  expect_weights(route_row({3e38F, -3e38F, 3e38F}, Gate::softmax(2, false)).topk_weights, {0.5, 0.5});
  expect_weights(route_row({-1000, -1001}, Gate::softmax(2, true)).topk_weights, {logistic(1), logistic(-1)});
}

TEST(RoutingKnown, Sigmoid) {
  const Floats logits = {-1, 2, 0, 1};
  const Routing plain = route_row(logits, Gate::sigmoid(3, false));
  EXPECT_EQ(plain.topk_ids, (Ids{1, 3, 2}));
  expect_weights(plain.topk_weights, {logistic(2), logistic(1), 0.5});
  const double sum = logistic(2) + logistic(1) + 0.5;
  expect_weights(route_row(logits, Gate::sigmoid(3, true)).topk_weights, {logistic(2) / sum, logistic(1) / sum, 0.5 / sum});
  expect_weights(route_row(logits, Gate::sigmoid(3, true, 3.0F, 0.25F)).topk_weights,
                 {3 * logistic(2) / (sum + 0.25), 3 * logistic(1) / (sum + 0.25), 1.5 / (sum + 0.25)});
}

TEST(RoutingKnown, SigmoidSelectsByScoreSoSaturationIsATie) {
  EXPECT_EQ(route_row({30, 90, 40}, Gate::sigmoid(2, false)).topk_ids, (Ids{0, 1}));
  EXPECT_EQ(route_row({30, 90, 40}, Gate::softmax(2, false)).topk_ids, (Ids{1, 2}));
}

TEST(RoutingKnown, SigmoidsThatAllUnderflowGiveZeroNotNan) {
  const Routing routing = route_row({-200, -300, -250}, Gate::sigmoid(2, true));
  EXPECT_EQ(routing.topk_ids, (Ids{0, 1}));
  EXPECT_EQ(routing.topk_weights, (Floats{0, 0}));
}

TEST(RoutingKnown, TiesGoToTheLowerExpert) {
  for (const Gate& gate : {Gate::softmax(3, true), Gate::sigmoid(3, true), Gate::grouped_max(3, 2, 2)}) {
    EXPECT_EQ(route_row({1, 2, 2, 1, 2, 2}, gate).topk_ids, (Ids{1, 2, 4}));
    EXPECT_EQ(route_row({7, 7, 7, 7, 7, 7}, gate).topk_ids, (Ids{0, 1, 2}));
  }
}

TEST(RoutingKnown, GroupedMax) {
  // Groups {0,1} {2,3} {4,5}; maxima 5, 4, 3: groups 0 and 1 stay, so 3 loses to 1 although it is higher.
  const Floats logits = {5, 1, 4, 2, 3, 3};
  const Routing routing = route_row(logits, Gate::grouped_max(3, 3, 2));
  EXPECT_EQ(routing.topk_ids, (Ids{0, 2, 3}));
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit);
  expect_weights(routing.topk_weights, {std::exp(5) / sum, std::exp(4) / sum, std::exp(2) / sum});
  const double chosen = std::exp(5) + std::exp(4) + std::exp(2);
  expect_weights(route_row(logits, Gate::grouped_max(3, 3, 2, true)).topk_weights,
                 {std::exp(5) / chosen, std::exp(4) / chosen, std::exp(2) / chosen});
}

TEST(RoutingKnown, TiedGroupsGoToTheLowerGroup) {
  EXPECT_EQ(route_row({1, 0, 5, 0, 5, 4, 5, 4}, Gate::grouped_max(2, 4, 1)).topk_ids, (Ids{2, 3}));
}

TEST(RoutingKnown, BiasChoosesButDoesNotWeigh) {
  const Floats logits = {0, 1, 2};
  const Floats bias = {1, 0, 0};  // 1.5, 0.731, 0.881
  const Routing plain = route_row(logits, Gate::bias_corrected(2, Score::sigmoid, 1, 1, false), bias);
  EXPECT_EQ(plain.topk_ids, (Ids{0, 2}));
  expect_weights(plain.topk_weights, {0.5, logistic(2)});
  const double sum = 0.5 + logistic(2);
  expect_weights(route_row(logits, Gate::bias_corrected(2, Score::sigmoid, 1, 1, true, 2.5F), bias).topk_weights,
                 {2.5 * 0.5 / sum, 2.5 * logistic(2) / sum});
}

TEST(RoutingKnown, BiasCorrectedSoftmax) {
  const Floats logits = {std::log(1.0F), std::log(4.0F), std::log(3.0F), std::log(2.0F)};
  const Routing routing = route_row(logits, Gate::bias_corrected(2, Score::softmax, 1, 1, true), {0.35F, 0, 0, 0});  // 0.45 0.4 0.3 0.2
  EXPECT_EQ(routing.topk_ids, (Ids{0, 1}));
  expect_weights(routing.topk_weights, {0.2, 0.8});
}

TEST(RoutingKnown, BiasCorrectedGroupsByTheirTwoBest) {
  // Zero logits score 0.5. With the bias, groups {0,1,2} {3,4,5} {6,7,8}: two best sum to 2.2, 2.4, 2.1 (third ones do not count).
  const Floats bias = {1.0F, 0.2F, 0.2F, 0.8F, 0.6F, -3.0F, 0.55F, 0.55F, 0.55F};
  const Routing one = route_row(Floats(9, 0.0F), Gate::bias_corrected(2, Score::sigmoid, 3, 1, true), bias);
  EXPECT_EQ(one.topk_ids, (Ids{3, 4}));
  const Routing two = route_row(Floats(9, 0.0F), Gate::bias_corrected(4, Score::sigmoid, 3, 2, true), bias);
  EXPECT_EQ(two.topk_ids, (Ids{0, 3, 4, 1}));
  expect_weights(two.topk_weights, {0.25, 0.25, 0.25, 0.25});
}

TEST(RoutingKnown, ExcludedGroupsStayExcluded) {
  // All of group 1 is below zero; masking the other group with zeros, as some code does, would choose from it instead.
  const Floats bias = {-2.0F, -2.1F, -3.0F, -3.1F};
  EXPECT_EQ(route_row(Floats(4, 0.0F), Gate::bias_corrected(2, Score::sigmoid, 2, 1, false), bias).topk_ids, (Ids{0, 1}));
}

TEST(RoutingKnown, GroupsOfOneExpert) {
  EXPECT_EQ(route_row({3, 1, 2}, Gate::bias_corrected(2, Score::sigmoid, 3, 2, false), {0, 0, 0}).topk_ids, (Ids{0, 2}));
}

TEST(RoutingKnown, BiasOfMinusInfinityExcludesAnExpert) {
  const Routing routing = route_row({9, 1, 2}, Gate::bias_corrected(2, Score::sigmoid, 1, 1, false), {-kInf, 0, kNan});
  EXPECT_EQ(routing.topk_ids, (Ids{1, -1}));
  expect_weights(routing.topk_weights, {logistic(1), 0});
}

TEST(RoutingKnown, PerGroup) {
  // Groups {0,1,2} {3,4,5}, two from each; slots in order of score over all groups.
  const Floats logits = {1, 6, 5, 2, 9, 3};
  const Routing routing = route_row(logits, Gate::per_group(4, 2, Score::softmax, true));
  EXPECT_EQ(routing.topk_ids, (Ids{4, 1, 2, 5}));
  const double sum = std::exp(0) + std::exp(-3) + std::exp(-4) + std::exp(-6);
  expect_weights(routing.topk_weights, {1 / sum, std::exp(-3) / sum, std::exp(-4) / sum, std::exp(-6) / sum});
  const Routing by_sigmoid = route_row({0, 2, 1, -1}, Gate::per_group(2, 2, Score::sigmoid, false));
  EXPECT_EQ(by_sigmoid.topk_ids, (Ids{1, 2}));
  expect_weights(by_sigmoid.topk_weights, {logistic(2), logistic(1)});
  EXPECT_EQ(route_row({40, 90, 1, 0}, Gate::per_group(2, 2, Score::sigmoid, false)).topk_ids, (Ids{0, 2}));  // saturated: a tie
}

TEST(RoutingKnown, WhatIsNotFiniteNeverSelects) {
  const Routing routing = route_row({kNan, 1, -kInf, kInf, 0}, Gate::softmax(4, false));
  EXPECT_EQ(routing.topk_ids, (Ids{1, 4, -1, -1}));
  expect_weights(routing.topk_weights, {logistic(1), logistic(-1), 0, 0});
  EXPECT_EQ(routing.load, (std::vector<std::int64_t>{0, 1, 0, 0, 1}));
}

TEST(RoutingKnown, RowsWithoutAFiniteLogitChooseNothing) {
  const Floats logits = {kNan, kNan, -kInf, kNan, kInf, -kInf};
  const Floats bias = {1, 2, 3};
  for (const Gate& gate : {Gate::softmax(2, true), Gate::sigmoid(2, true), Gate::grouped_max(2, 1, 1),
                           Gate::per_group(2, 1, Score::softmax, true), Gate::bias_corrected(2, Score::softmax, 1, 1, true)}) {
    RoutingInput input{.logits = matrix(logits, 3)};
    if (gate.kind == GateKind::bias_corrected) input.bias = {bias.data(), Dtype::float32, {3}};
    const Routing routing = route(input, gate);
    EXPECT_EQ(routing.topk_ids, (Ids{-1, -1, -1, -1}));
    EXPECT_EQ(routing.topk_weights, (Floats{0, 0, 0, 0}));
    EXPECT_EQ(routing.load, (std::vector<std::int64_t>{0, 0, 0}));
  }
}

TEST(RoutingKnown, MaskedTokensChooseNothing) {
  const Floats logits = {1, 2, 1, 2, 1, 2};
  const std::vector<std::uint8_t> mask = {1, 0, 255};
  const std::vector<std::int64_t> given = {0, 0, 1};
  RoutingInput input{.logits = matrix(logits, 2), .mask = {mask.data(), Dtype::uint8, {3}}};
  EXPECT_EQ(route(input, Gate::softmax(1, true)).topk_ids, (Ids{1, -1, 1}));
  input.given_ids = {given.data(), Dtype::int64, {3, 1}};
  const Routing replay = route(input, Gate::softmax(1, true));
  EXPECT_EQ(replay.topk_ids, (Ids{0, -1, 1}));
  EXPECT_EQ(replay.topk_weights, (Floats{1, 0, 1}));
  EXPECT_EQ(replay.load, (std::vector<std::int64_t>{1, 1}));
}

TEST(RoutingKnown, GivenIdsAreWeighedByTheRule) {
  const Floats logits = {std::log(1.0F), std::log(4.0F), std::log(3.0F), std::log(2.0F)};
  const std::vector<std::int32_t> given = {3, -7, 0};
  RoutingInput input{.logits = matrix(logits, 4), .given_ids = {given.data(), Dtype::int32, {1, 3}}};
  const Routing plain = route(input, Gate::softmax(3, false));
  EXPECT_EQ(plain.topk_ids, (Ids{3, -1, 0}));
  expect_weights(plain.topk_weights, {0.2, 0, 0.1});
  expect_weights(route(input, Gate::softmax(3, true)).topk_weights, {2.0 / 3, 0, 1.0 / 3});
  const double sum = 2.0 / 3 + 0.5;  // sigmoid(log n) = n / (n + 1)
  expect_weights(route(input, Gate::sigmoid(3, true)).topk_weights, {2.0 / 3 / sum, 0, 0.5 / sum});
}

TEST(RoutingKnown, RenormalisedReplayFarBelowTheBestDoesNotUnderflow) {
  const Floats logits = {0, -200, -200};
  const std::vector<std::int64_t> given = {1, 2};
  const RoutingInput input{.logits = matrix(logits, 3), .given_ids = {given.data(), Dtype::int64, {1, 2}}};
  EXPECT_EQ(route(input, Gate::softmax(2, true)).topk_weights, (Floats{0.5F, 0.5F}));
  EXPECT_EQ(route(input, Gate::softmax(2, false)).topk_weights, (Floats{0, 0}));
}

TEST(RoutingKnown, GivenIdsMayRepeatAndMayHitWhatIsNotFinite) {
  const Floats logits = {0, kNan, 0};
  const std::vector<std::int64_t> given = {2, 2, 1};
  RoutingInput input{.logits = matrix(logits, 3), .given_ids = {given.data(), Dtype::int64, {1, 3}}};
  const Routing routing = route(input, Gate::softmax(3, true));
  EXPECT_EQ(routing.topk_ids, (Ids{2, 2, 1}));
  expect_weights(routing.topk_weights, {0.5, 0.5, 0});
  EXPECT_EQ(routing.load, (std::vector<std::int64_t>{0, 1, 2}));
  const std::vector<std::int64_t> only_nan = {1, 1, -1};
  input.given_ids = {only_nan.data(), Dtype::int64, {1, 3}};
  EXPECT_EQ(route(input, Gate::softmax(3, true)).topk_weights, (Floats{0, 0, 0}));
}

TEST(RoutingKnown, ZeroTokens) {
  const Routing routing = route({.logits = {nullptr, Dtype::float32, {0, 5}}}, Gate::softmax(2, true));
  EXPECT_EQ(routing.num_tokens(), 0);
  EXPECT_EQ(routing.load, std::vector<std::int64_t>(5, 0));
}

TEST(RoutingKnown, Views) {
  const Routing routing = route_row({1, 2, 3}, Gate::softmax(2, true));
  EXPECT_EQ(describe(routing.ids_view()), "[1, 2] int64");
  EXPECT_EQ(describe(routing.weights_view()), "[1, 2] float32");
}

}  // namespace
}  // namespace tokenyard
