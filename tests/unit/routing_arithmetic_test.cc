// The float32 functions that routing is built from.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "routing/arithmetic.h"

namespace tokenyard::routing_internal {
namespace {

// Distance in units of the last place of the exact result.
double ulps(float value, double exact) {
  const float rounded = static_cast<float>(exact);
  const double unit = static_cast<double>(std::nextafter(rounded, std::numeric_limits<float>::infinity())) - rounded;
  return std::abs(value - exact) / unit;
}

TEST(RoutingArithmetic, ExponentialIsAccurate) {
  double worst = 0;
  float worst_at = 0;
  for (std::uint32_t bits = 0x80000000U; bits < 0xc2d20000U; bits += 509) {  // -0 .. -105, a float in every 509
    const float x = std::bit_cast<float>(bits);
    const double error = ulps(exp_of_negative(x), std::exp(static_cast<double>(x)));
    if (error > worst) {
      worst = error;
      worst_at = x;
    }
  }
  EXPECT_LT(worst, 1.0) << "at " << worst_at;
}

TEST(RoutingArithmetic, ExponentialOfTheEnds) {
  EXPECT_EQ(exp_of_negative(0.0F), 1.0F);
  EXPECT_EQ(exp_of_negative(-0.0F), 1.0F);
  EXPECT_EQ(exp_of_negative(-std::numeric_limits<float>::infinity()), 0.0F);
  EXPECT_EQ(exp_of_negative(-std::numeric_limits<float>::max()), 0.0F);
  EXPECT_EQ(exp_of_negative(-103.5F), std::numeric_limits<float>::denorm_min());
}

// Pinned bits: what a GPU has to reproduce.
TEST(RoutingArithmetic, BitsAreFixed) {
  EXPECT_EQ(std::bit_cast<std::uint32_t>(exp_of_negative(-1.0F)), 0x3ebc5ab2U);
  EXPECT_EQ(std::bit_cast<std::uint32_t>(exp_of_negative(-17.25F)), 0x330a7a4fU);
  EXPECT_EQ(std::bit_cast<std::uint32_t>(sigmoid(0.7F)), 0x3f2b0e5aU);
}

TEST(RoutingArithmetic, SigmoidIsAccurateAndBounded) {
  for (float x = -120; x < 120; x += 0.0137F) {
    EXPECT_LT(ulps(sigmoid(x), 1 / (1 + std::exp(-static_cast<double>(x)))), 2.0) << x;
  }
  EXPECT_EQ(sigmoid(0.0F), 0.5F);
  EXPECT_EQ(sigmoid(std::numeric_limits<float>::max()), 1.0F);
  EXPECT_EQ(sigmoid(kNever), 0.0F);
}

RC_GTEST_PROP(RoutingArithmetic, TopKIsASortedPrefix, ()) {
  const auto scores = *rc::gen::container<std::vector<int>>(rc::gen::inRange(-5, 6));  // many ties; -5 stands for kNever
  const int k = *rc::gen::inRange(1, kMaxTopK + 1);
  TopK best(k);
  std::vector<std::pair<float, int>> expected;
  for (int id = 0; id < std::ssize(scores); ++id) {
    const float score = scores[id] == -5 ? kNever : static_cast<float>(scores[id]);
    best.insert(score, id);
    if (score != kNever) expected.emplace_back(-score, id);
  }
  std::sort(expected.begin(), expected.end());
  if (std::ssize(expected) > k) expected.resize(static_cast<std::size_t>(k));
  RC_ASSERT(best.size == std::ssize(expected));
  for (int i = 0; i < best.size; ++i) {
    RC_ASSERT(best.ids[i] == expected[i].second);
    RC_ASSERT(best.scores[i] == -expected[i].first);
  }
}

}  // namespace
}  // namespace tokenyard::routing_internal
