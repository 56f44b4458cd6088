// Which elements a rank holds, against the specification's formula and against the definition of the cut.

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "tokenyard/weights.h"
#include "unit/expect_usage_error.h"
#include "unit/seeded_random.h"

namespace tokenyard {
namespace {

using testing::expect_usage_error;

std::vector<std::int64_t> indices(const ShardMap& map) {
  std::vector<std::int64_t> result;
  for (std::int64_t i = 0; i < map.local_elements(); ++i) result.push_back(map.global_index(i));
  return result;
}

// 16 rows, 2 experts, ep = tp = 2: the specification's example.
TEST(ExpertShard, RowsOfTheExample) {
  const ExpertShape shape = {.num_experts = 2, .hidden_size = 1, .expert_width = 4};
  const Placement placement = Placement::tensor_parallel(2, 2, 2);
  const std::vector<std::vector<std::int64_t>> rows = {{0, 1, 4, 5}, {2, 3, 6, 7}, {8, 9, 12, 13}, {10, 11, 14, 15}};
  for (int rank = 0; rank < 4; ++rank) EXPECT_EQ(indices(expert_shard(ExpertTensor::w13, shape, placement, rank)), rows[rank]);
}

// Local row l on (e, t), j = l / run, o = l % run, is global row g0 + (j * tp + t) * run + o, with `stripes` stripes.
std::vector<std::int64_t> rows_by_formula(std::int64_t g0, std::int64_t rows, std::int64_t stripes, int tp, int t) {
  const std::int64_t run = rows / (stripes * tp);
  std::vector<std::int64_t> result;
  for (std::int64_t l = 0; l < rows / tp; ++l) result.push_back(g0 + (l / run * tp + t) * run + l % run);
  return result;
}

TEST(ExpertShard, RowsFollowTheFormula) {
  for (const int experts : {1, 2, 5, 8}) {
    for (const int ep : {1, 2, 4}) {
      for (const int tp : {1, 2, 3}) {
        const std::int64_t width = 6;
        const Placement placement = Placement::tensor_parallel(experts, ep, tp);
        for (int rank = 0; rank < ep * tp; ++rank) {
          const auto local = placement.local_experts(rank);
          const ShardMap map =
              expert_shard(ExpertTensor::w13, {.num_experts = experts, .hidden_size = 1, .expert_width = width}, placement, rank);
          if (local.empty()) {
            EXPECT_EQ(map.local_elements(), 0);
            continue;
          }
          const std::int64_t stripes = std::ssize(local) * 2;
          EXPECT_EQ(indices(map), rows_by_formula(local.front() * 2 * width, stripes * width, stripes, tp, rank % tp));
        }
      }
    }
  }
}

// One expert's gated product on whole weights: w2 (silu(gate x) * (up x)), w13 [2, I, 1] and w2 [1, I].
double feed_forward(const std::vector<double>& w13, const std::vector<double>& w2) {
  const std::size_t width = w2.size();
  double sum = 0;
  for (std::size_t i = 0; i < width; ++i) sum += w2[i] * (w13[i] / (1 + std::exp(-w13[i]))) * w13[width + i];
  return sum;
}

TEST(ExpertShard, CuttingWithOneStripePerExpertMixesGateAndUp) {
  const std::vector<double> w13 = {0.5, -1, 2, 0.25, 3, 1, -2, 0.75};
  const std::vector<double> w2 = {1, 2, 3, 4};
  const double whole = feed_forward(w13, w2);
  const auto summed_over_shards = [&](auto rows_of_shard) {
    double sum = 0;
    for (int t = 0; t < 2; ++t) {
      std::vector<double> part;
      for (const std::int64_t row : rows_of_shard(t)) part.push_back(w13[static_cast<std::size_t>(row)]);
      sum += feed_forward(part, {w2.begin() + 2 * t, w2.begin() + 2 * t + 2});
    }
    return sum;
  };
  const Placement placement = Placement::tensor_parallel(1, 1, 2);
  const ExpertShape shape = {.num_experts = 1, .hidden_size = 1, .expert_width = 4};
  EXPECT_NEAR(summed_over_shards([&](int t) { return indices(expert_shard(ExpertTensor::w13, shape, placement, t)); }), whole, 1e-12);
  // The same number of rows per shard, so nothing but the numbers tells.
  EXPECT_GT(std::abs(summed_over_shards([&](int t) { return rows_by_formula(0, 8, 1, 2, t); }) - whole), 0.1);
}

// Element by element, from what each tensor's indices mean.
TEST(ExpertShard, EveryTensorIsCutAlongTheExpertWidth) {
  testing::SeededRandom random;
  for (int round = 0; round < 60; ++round) {
    const int tp = static_cast<int>(random.between(1, 3));
    const int ep = static_cast<int>(random.between(1, 3));
    const std::int64_t block = random.between(1, 3);
    const ExpertShape shape = {.num_experts = static_cast<int>(random.between(1, 5)),
                               .hidden_size = random.between(1, 7),
                               .expert_width = tp * block * random.between(1, 3),
                               .scale_block = block};
    const Placement placement = Placement::tensor_parallel(shape.num_experts, ep, tp);
    const auto scales = [block](std::int64_t size) { return (size + block - 1) / block; };
    struct Case {
      ExpertTensor tensor;
      std::int64_t projections, rows, columns, cut_columns;  // cut along columns, else rows
    };
    const std::int64_t width = shape.expert_width;
    const std::int64_t hidden = shape.hidden_size;
    for (const Case& c : {Case{ExpertTensor::w13, 2, width, hidden, 0}, Case{ExpertTensor::w2, 1, hidden, width, 1},
                          Case{ExpertTensor::w13_bias, 2, width, 1, 0}, Case{ExpertTensor::w13_scale, 2, scales(width), scales(hidden), 0},
                          Case{ExpertTensor::w2_scale, 1, scales(hidden), scales(width), 1}}) {
      for (int rank = 0; rank < ep * tp; ++rank) {
        std::vector<std::int64_t> expected;
        for (const int expert : placement.local_experts(rank)) {
          for (std::int64_t p = 0; p < c.projections; ++p) {
            for (std::int64_t row = 0; row < c.rows; ++row) {
              for (std::int64_t column = 0; column < c.columns; ++column) {
                const std::int64_t along = c.cut_columns ? column : row;
                const std::int64_t size = c.cut_columns ? c.columns : c.rows;
                if (along * tp / size != rank % tp) continue;
                expected.push_back(((expert * c.projections + p) * c.rows + row) * c.columns + column);
              }
            }
          }
        }
        EXPECT_EQ(indices(expert_shard(c.tensor, shape, placement, rank)), expected) << name(c.tensor);
      }
    }
  }
}

TEST(ExpertShard, TheSecondBiasIsOnTheFirstShardAlone) {
  const Placement placement = Placement::tensor_parallel(2, 2, 2);
  const ExpertShape shape = {.num_experts = 2, .hidden_size = 3, .expert_width = 4};
  EXPECT_EQ(indices(expert_shard(ExpertTensor::w2_bias, shape, placement, 2)), (std::vector<std::int64_t>{3, 4, 5}));
  EXPECT_EQ(expert_shard(ExpertTensor::w2_bias, shape, placement, 3).local_elements(), 0);
}

// Replicas, and experts that are cut differently: the placement says it all.
TEST(ExpertShard, AnyPlacement) {
  const Placement placement = Placement::custom(3, {{{{0, 1}, 1}, {{2}, 1}}, {{{1}, 1}}});
  const ExpertShape shape = {.num_experts = 2, .hidden_size = 1, .expert_width = 2};
  EXPECT_EQ(indices(expert_shard(ExpertTensor::w13, shape, placement, 0)), (std::vector<std::int64_t>{0, 2}));
  EXPECT_EQ(indices(expert_shard(ExpertTensor::w13, shape, placement, 1)), (std::vector<std::int64_t>{1, 3, 4, 5, 6, 7}));
  EXPECT_EQ(indices(expert_shard(ExpertTensor::w13, shape, placement, 2)), (std::vector<std::int64_t>{0, 1, 2, 3}));
}

TEST(ExpertShard, FullShapes) {
  const ExpertShape shape = {.num_experts = 4, .hidden_size = 200, .expert_width = 300};
  using Sizes = std::vector<std::int64_t>;
  EXPECT_EQ(full_shape(ExpertTensor::w13, shape), (Sizes{4, 2, 300, 200}));
  EXPECT_EQ(full_shape(ExpertTensor::w2, shape), (Sizes{4, 200, 300}));
  EXPECT_EQ(full_shape(ExpertTensor::w13_bias, shape), (Sizes{4, 2, 300}));
  EXPECT_EQ(full_shape(ExpertTensor::w2_bias, shape), (Sizes{4, 200}));
  EXPECT_EQ(full_shape(ExpertTensor::w13_scale, shape), (Sizes{4, 2, 3, 2}));
  EXPECT_EQ(full_shape(ExpertTensor::w2_scale, shape), (Sizes{4, 2, 3}));
}

TEST(ExpertShard, Errors) {
  const Placement two = Placement::tensor_parallel(4, 1, 2);
  const auto shard = [&](ExpertTensor tensor, std::int64_t width) {
    return expert_shard(tensor, {.num_experts = 4, .hidden_size = 8, .expert_width = width}, two, 0);
  };
  expect_usage_error([&] { shard(ExpertTensor::w13, 7); }, {"w13", "expert_width = 7", "2 shards"});
  expect_usage_error([&] { shard(ExpertTensor::w2, 7); }, {"w2", "expert_width = 7", "2 shards"});
  expect_usage_error([&] { shard(ExpertTensor::w13_scale, 384); }, {"w13_scale", "384", "192 rows", "128", "two shards"});
  EXPECT_EQ(shard(ExpertTensor::w13_scale, 512).local_elements(), 4 * 2 * 2);
  expect_usage_error([&] { shard(ExpertTensor::w13, 0); }, {"expert_width = 0"});
  expect_usage_error([&] { expert_shard(ExpertTensor::w13, {.num_experts = 5, .hidden_size = 8, .expert_width = 2}, two, 0); },
                     {"placement has 4 experts, the tensor 5"});
}

TEST(ShardMap, PartsCoverTheShardOnce) {
  testing::SeededRandom random;
  for (int round = 0; round < 100; ++round) {
    const std::int64_t unit = random.between(1, 4);
    std::vector<tokenyard::Run> ranges;
    std::int64_t at = 0;
    for (int run = 0; run < random.between(0, 5); ++run) {
      at += random.between(0, 3);
      ranges.push_back({at, 0, unit * random.between(0, 4)});
      at += ranges.back().length;
    }
    const ShardMap map = ShardMap::of_ranges(at + 2, ranges);
    const int parts = static_cast<int>(random.between(1, 5));
    std::vector<std::int64_t> joined;
    std::int64_t largest = 0;
    std::int64_t smallest = map.local_elements();
    for (int part = 0; part < parts; ++part) {
      const ShardMap piece = map.part(parts, part, unit);
      largest = std::max(largest, piece.local_elements());
      smallest = std::min(smallest, piece.local_elements());
      for (const std::int64_t index : indices(piece)) joined.push_back(index);
      EXPECT_EQ(piece.local_elements() % unit, 0);
    }
    EXPECT_EQ(joined, indices(map));
    EXPECT_LE(largest - smallest, unit);
  }
}

TEST(ShardMap, NeighboursAreOneRun) {
  EXPECT_EQ(ShardMap::of_ranges(9, {{0, 0, 2}, {2, 0, 3}, {6, 0, 0}, {7, 0, 2}}).runs().size(), 2U);
  EXPECT_EQ(ShardMap::whole(0).runs().size(), 0U);
}

TEST(ShardMap, Errors) {
  expect_usage_error([] { ShardMap::of_ranges(4, {{3, 0, 2}}); }, {"elements 3 to 5", "tensor of 4"});
  expect_usage_error([] { ShardMap::of_ranges(4, {{-1, 0, 2}}); }, {"elements -1 to 1"});
  expect_usage_error([] { ShardMap::of_ranges(9, {{4, 0, 2}, {0, 0, 5}}); }, {"element 4 is held twice"});
  expect_usage_error([] { ShardMap::whole(4).part(2, 2); }, {"part 2 of 2"});
  expect_usage_error([] { ShardMap::whole(4).part(2, 0, 3); }, {"unit = 3", "4 elements"});
  expect_usage_error([] { ShardMap::whole(4).global_index(4); }, {"local index 4"});
}

}  // namespace
}  // namespace tokenyard
