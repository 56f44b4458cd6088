// Experts of float8 weights give, bit for bit, what the same numbers give in float32.

#include <gtest/gtest.h>

#include "experts/float8_weights.h"
#include "experts/rows.h"
#include "tokenyard/experts.h"
#include "unit/expect_usage_error.h"

namespace tokenyard {
namespace {

using testing::Buffer;
using testing::Case;
using testing::expect_usage_error;
using testing::Float8Experts;
using testing::SeededRandom;

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

TEST(Float8Experts, GiveWhatTheirNumbersGiveInFloat32) {
  SeededRandom random;
  for (int round = 0; round < 8; ++round) {
    const Dtype dtype = random.pick(kDtypes);
    const Case c = testing::random_case(random);
    const std::int64_t experts = c.experts(), width = 128 * random.between(1, 2), hidden = 16 * random.between(1, 18);
    SCOPED_TRACE(c.describe() + std::string(name(dtype)) + " width " + std::to_string(width) + " hidden " + std::to_string(hidden));
    const Float8Experts float8(random, experts, width, hidden);
    const std::vector<float> w13 = float8.w13.widened(), w2 = float8.w2.widened();
    const Buffer x = Buffer::rows(random, dtype, c, hidden);
    const Buffer w13_bias = Buffer::random(random, dtype, experts, 2 * width);
    ExpertWeights narrow = float8.views();
    ExpertWeights wide = {.w13 = {w13.data(), Dtype::float32, {experts, 2, width, hidden}},
                          .w2 = {w2.data(), Dtype::float32, {experts, hidden, width}}};
    narrow.w13_bias = wide.w13_bias = {w13_bias.data(), dtype, {experts, 2, width}};
    Buffer y = Buffer::nan(dtype, c.groups.places, hidden), expected = y;
    experts_forward(x.view(), c.groups, narrow, {}, y.view(), nullptr);
    experts_forward(x.view(), c.groups, wide, {}, expected.view(), nullptr);
    EXPECT_EQ(std::memcmp(y.data(), expected.data(), y.num_bytes()), 0);
  }
}

TEST(Float8Experts, SayWhatDoesNotFit) {
  SeededRandom random;
  const RowGroups groups = {.places = 1, .begins = {0}, .counts = {1}, .rows = {}};
  const Buffer x = Buffer::filled(Dtype::float32, 1, 144, 1.0F);
  Buffer y = x;
  const Float8Experts float8(random, 1, 128, 144);
  const auto forward = [&](const ExpertWeights& weights) { experts_forward(x.view(), groups, weights, {}, y.view(), nullptr); };
  ExpertWeights wrong = float8.views();
  wrong.w13_scale = {};
  expect_usage_error([&] { forward(wrong); }, {"w13_scale is absent", "[1, 2, 1, 2] float32"});
  wrong = float8.views();
  wrong.w2_scale = {wrong.w2_scale.data, Dtype::float32, {1, 1, 2}};
  expect_usage_error([&] { forward(wrong); }, {"w2_scale is [1, 1, 2] float32", "[1, 2, 1] float32"});
  wrong = float8.views();
  wrong.w2.dtype = Dtype::uint8;
  expect_usage_error([&] { forward(wrong); }, {"w2 is [1, 144, 128] uint8", "float8_e4m3"});
  wrong = float8.views();
  wrong.w13.dtype = wrong.w2.dtype = Dtype::bfloat16;
  expect_usage_error([&] { forward(wrong); }, {"w13_scale is [1, 2, 1, 2] float32", "give none"});
  const Float8Experts cut(random, 1, 64, 144);  // a shard that ends inside a block
  expect_usage_error([&] { forward(cut.views()); }, {"[1, 2, 64, 144] float8_e4m3", "width is 64", "multiple of 128", "fewer shards"});
  const Buffer odd = Buffer::filled(Dtype::float32, 1, 24, 1.0F);
  Buffer odd_y = odd;
  const Float8Experts narrow(random, 1, 128, 24);
  expect_usage_error([&] { experts_forward(odd.view(), groups, narrow.views(), {}, odd_y.view(), nullptr); }, {"hidden_size 24", "of 16"});
}

TEST(Float8Experts, GoForwardOnly) {
  SeededRandom random;
  const RowGroups groups = {.places = 1, .begins = {0}, .counts = {1}, .rows = {}};
  const Buffer x = Buffer::filled(Dtype::float32, 1, 16, 1.0F);
  Buffer y = x;
  const Float8Experts float8(random, 1, 128, 16);
  ExpertActivations saved;
  expect_usage_error([&] { experts_forward(x.view(), groups, float8.views(), {}, y.view(), &saved); },
                     {"float8_e4m3 goes forward only", "widen the weights"});
  expect_usage_error([&] { experts_backward({.x = x.view(), .dy = x.view(), .saved = &saved}, groups, float8.views(), {}, y.view(), {}); },
                     {"float8_e4m3 goes forward only"});
}

}  // namespace
}  // namespace tokenyard
