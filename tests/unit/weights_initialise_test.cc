// Initial weights are a function of (seed, name, global element index).

#include <gtest/gtest.h>

#include <cmath>

#include "tokenyard/weights.h"
#include "unit/expect_usage_error.h"

namespace tokenyard {
namespace {

std::vector<float> drawn(std::string_view name, const Initialisation& how, const ShardMap& map) {
  std::vector<float> values(static_cast<std::size_t>(map.local_elements()));
  initialise(name, how, map, {values.data(), Dtype::float32, {std::ssize(values)}});
  return values;
}

TEST(Initialise, EveryLayoutStartsFromTheSameBits) {
  const ExpertShape shape = {.num_experts = 3, .hidden_size = 4, .expert_width = 6};
  for (const Distribution distribution : {Distribution::normal, Distribution::uniform}) {
    const Initialisation how = {.distribution = distribution, .seed = 7};
    for (const ExpertTensor tensor : {ExpertTensor::w13, ExpertTensor::w2}) {
      for (const auto& [ep, tp] : {std::pair{1, 1}, {2, 1}, {1, 2}, {3, 3}}) {
        const Placement placement = Placement::tensor_parallel(3, ep, tp);
        for (int rank = 0; rank < ep * tp; ++rank) {
          const ShardMap map = expert_shard(tensor, shape, placement, rank);
          const std::vector<float> full = drawn("w", how, ShardMap::whole(map.global_elements()));
          const std::vector<float> mine = drawn("w", how, map);
          for (std::int64_t i = 0; i < map.local_elements(); ++i) EXPECT_EQ(mine[i], full[map.global_index(i)]);
        }
      }
    }
  }
}

TEST(Initialise, HasTheMomentsOfItsDistribution) {
  constexpr std::int64_t kCount = 400'000;
  const auto moments = [&](Distribution distribution, float scale) {
    double sum = 0;
    double squares = 0;
    float largest = 0;
    for (const float x : drawn("moments", {.distribution = distribution, .scale = scale, .seed = 1}, ShardMap::whole(kCount))) {
      sum += x;
      squares += static_cast<double>(x) * x;
      largest = std::max(largest, std::abs(x));
    }
    return std::array{sum / kCount, squares / kCount, static_cast<double>(largest)};
  };
  const auto [mean, variance, largest] = moments(Distribution::normal, 2);
  EXPECT_NEAR(mean, 0, 5 * 2 / std::sqrt(kCount));
  EXPECT_NEAR(variance, 4, 0.05);
  EXPECT_GT(largest, 2 * 4);
  EXPECT_LE(largest, 2 * 6);
  const auto [uniform_mean, uniform_variance, bound] = moments(Distribution::uniform, 3);
  EXPECT_NEAR(uniform_mean, 0, 5 * 3 / std::sqrt(3.0 * kCount));
  EXPECT_NEAR(uniform_variance, 3, 0.03);
  EXPECT_GT(bound, 2.99);
  EXPECT_LE(bound, 3);
}

TEST(Initialise, SeedAndNameMatter) {
  const ShardMap map = ShardMap::whole(64);
  const std::vector<float> values = drawn("a", {.seed = 1}, map);
  EXPECT_EQ(drawn("a", {.seed = 1}, map), values);
  EXPECT_NE(drawn("a", {.seed = 2}, map), values);
  EXPECT_NE(drawn("b", {.seed = 1}, map), values);
  EXPECT_NE(drawn("aa", {.seed = 1}, map), values);
}

// Pinned, computed with another program: a run that is continued on another machine starts from these.
TEST(Initialise, IsTheSameOnEveryMachine) {
  const ShardMap map = ShardMap::of_ranges(std::int64_t{1} << 40, {{0, 0, 1}, {(std::int64_t{1} << 40) - 1, 0, 1}});
  std::vector<double> values(2);
  initialise("model.layers.0.mlp.experts", {.scale = 1, .seed = 42}, map, {values.data(), Dtype::float64, {2}});
  EXPECT_EQ(values[0], -0x1.b6b8000000000p-1);
  EXPECT_EQ(values[1], 0x1.e0f8000000000p-2);
  initialise("model.layers.0.mlp.experts", {.distribution = Distribution::uniform, .scale = 1, .seed = 42}, map,
             {values.data(), Dtype::float64, {2}});
  EXPECT_EQ(values[0], 0x1.434e3fa3147a0p-1);
}

TEST(Initialise, LowerTypesAreRoundedFromFloat32) {
  const ShardMap map = ShardMap::whole(1000);
  const std::vector<float> values = drawn("w", {}, map);
  std::vector<std::uint16_t> half(1000);
  initialise("w", {}, map, {half.data(), Dtype::bfloat16, {10, 100}});
  for (std::size_t i = 0; i < half.size(); ++i) EXPECT_EQ(half[i], float_to_bfloat16(values[i]));
  initialise("w", {}, map, {half.data(), Dtype::float16, {1000}});
  for (std::size_t i = 0; i < half.size(); ++i) EXPECT_EQ(half[i], float_to_float16(values[i]));
}

TEST(Initialise, Errors) {
  float value = 0;
  testing::expect_usage_error(
      [&] {
        initialise("w", {}, ShardMap::whole(2), {&value, Dtype::float32, {1}});
      },
      {"w: out is [1] float32", "2 dense elements"});
  testing::expect_usage_error([&] { initialise("w", {}, ShardMap::whole(1), {&value, Dtype::int32, {1}}); }, {"int32"});
}

}  // namespace
}  // namespace tokenyard
