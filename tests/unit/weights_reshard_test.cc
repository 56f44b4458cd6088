// Shards become other shards, bit for bit.

#include <gtest/gtest.h>

#include <cstring>

#include "tokenyard/weights.h"
#include "unit/expect_usage_error.h"
#include "unit/seeded_random.h"

namespace tokenyard {
namespace {

using Shard = std::vector<std::uint16_t>;

// What ranks hold under (ep, tp), cut once more over dp ranks: rank = dp * ep * tp + rank of the placement.
struct Layout3 {
  int dp = 1, ep = 1, tp = 1;
};

std::vector<ShardMap> maps_of(ExpertTensor tensor, const ExpertShape& shape, const Layout3& layout) {
  const Placement placement = Placement::tensor_parallel(shape.num_experts, layout.ep, layout.tp);
  std::vector<ShardMap> maps;
  for (int dp = 0; dp < layout.dp; ++dp) {
    for (int rank = 0; rank < placement.ranks(); ++rank) maps.push_back(expert_shard(tensor, shape, placement, rank).part(layout.dp, dp));
  }
  return maps;
}

Shard shard_of(const Shard& full, const ShardMap& map) {
  Shard shard;
  for (std::int64_t i = 0; i < map.local_elements(); ++i) shard.push_back(full[static_cast<std::size_t>(map.global_index(i))]);
  return shard;
}

std::vector<Shard> moved(const std::vector<Shard>& from, const std::vector<Transfer>& plan, const std::vector<ShardMap>& to) {
  std::vector<Shard> result;
  for (const ShardMap& map : to) result.emplace_back(static_cast<std::size_t>(map.local_elements()), std::uint16_t{0xdead});
  for (const Transfer& piece : plan) {
    for (std::int64_t i = 0; i < piece.length; ++i) {
      result.at(static_cast<std::size_t>(piece.to_rank)).at(static_cast<std::size_t>(piece.to_offset + i)) =
          from.at(static_cast<std::size_t>(piece.from_rank)).at(static_cast<std::size_t>(piece.from_offset + i));
    }
  }
  return result;
}

std::vector<Shard> shards_of(const Shard& full, const std::vector<ShardMap>& maps) {
  std::vector<Shard> shards;
  for (const ShardMap& map : maps) shards.push_back(shard_of(full, map));
  return shards;
}

Shard random_full(testing::SeededRandom& random, std::int64_t elements) {
  Shard full;
  for (std::int64_t i = 0; i < elements; ++i) full.push_back(static_cast<std::uint16_t>(random()));
  return full;
}

TEST(Reshard, BetweenAnyTwoLayouts) {
  testing::SeededRandom random;
  const ExpertShape shape = {.num_experts = 5, .hidden_size = 3, .expert_width = 12, .scale_block = 1};
  for (const ExpertTensor tensor : {ExpertTensor::w13, ExpertTensor::w2, ExpertTensor::w13_bias, ExpertTensor::w2_bias}) {
    const std::int64_t elements = maps_of(tensor, shape, {})[0].global_elements();
    const Shard full = random_full(random, elements);
    constexpr Layout3 kLayouts[] = {{1, 4, 3}, {1, 3, 4}, {1, 6, 2}, {2, 3, 2}, {3, 1, 4}, {12, 1, 1}, {1, 1, 12}, {1, 12, 1}};
    for (const Layout3& a : kLayouts) {
      for (const Layout3& b : kLayouts) {
        const std::vector<ShardMap> from = maps_of(tensor, shape, a);
        const std::vector<ShardMap> to = maps_of(tensor, shape, b);
        EXPECT_EQ(moved(shards_of(full, from), reshard_plan(from, to), to), shards_of(full, to));
      }
    }
  }
}

TEST(Reshard, ThereAndBackAgain) {
  const ExpertShape shape = {.num_experts = 4, .hidden_size = 8, .expert_width = 16};
  run_ranks(4, [&](World& world) {
    const auto collectives = Collectives::create(world);
    for (const ExpertTensor tensor : {ExpertTensor::w13, ExpertTensor::w2, ExpertTensor::w2_bias}) {
      const std::vector<ShardMap> before = maps_of(tensor, shape, {1, 2, 2});
      const std::vector<ShardMap> after = maps_of(tensor, shape, {1, 1, 4});
      Shard full;
      for (std::int64_t i = 0; i < before[0].global_elements(); ++i) full.push_back(static_cast<std::uint16_t>(i * 40503U));
      const Shard mine = shard_of(full, before[world.rank()]);
      Shard there(static_cast<std::size_t>(after[world.rank()].local_elements()));
      Shard back(mine.size());
      const auto view = [](Shard& shard) { return TensorView(shard.data(), Dtype::bfloat16, {std::ssize(shard)}); };
      const ConstTensorView in(mine.data(), Dtype::bfloat16, {std::ssize(mine)});
      reshard(*collectives, before, after, in, view(there));
      EXPECT_EQ(there, shard_of(full, after[world.rank()]));
      reshard(*collectives, after, before, view(there), view(back));
      EXPECT_EQ(back, mine);
    }
  });
}

TEST(Reshard, GatherFullOverAllDimensions) {
  const ExpertShape shape = {.num_experts = 3, .hidden_size = 5, .expert_width = 4};
  run_ranks(8, [&](World& world) {
    const auto collectives = Collectives::create(world);
    for (const ExpertTensor tensor : {ExpertTensor::w13, ExpertTensor::w2}) {
      const std::vector<ShardMap> maps = maps_of(tensor, shape, {2, 2, 2});
      std::vector<float> full(static_cast<std::size_t>(maps[0].global_elements()));
      initialise("layer", {.seed = 3}, ShardMap::whole(std::ssize(full)), {full.data(), Dtype::float32, {std::ssize(full)}});
      std::vector<float> mine(static_cast<std::size_t>(maps[world.rank()].local_elements()));
      initialise("layer", {.seed = 3}, maps[world.rank()], {mine.data(), Dtype::float32, {std::ssize(mine)}});
      std::vector<float> gathered(world.rank() == 5 ? full.size() : 0);
      gather_full(*collectives, maps, {mine.data(), Dtype::float32, {std::ssize(mine)}}, 5,
                  {gathered.data(), Dtype::float32, {std::ssize(gathered)}});
      if (world.rank() == 5) {
        EXPECT_EQ(std::memcmp(gathered.data(), full.data(), full.size() * sizeof(float)), 0);
      }
    }
  });
}

TEST(Reshard, WhatARankHoldsComesFromItself) {
  const std::vector<ShardMap> replicas(3, ShardMap::whole(10));
  const auto to = std::vector<ShardMap>{ShardMap::whole(10), ShardMap::of_ranges(10, {{4, 0, 2}}), ShardMap::of_ranges(10, {})};
  EXPECT_EQ(reshard_plan(replicas, to), (std::vector<Transfer>{{0, 0, 0, 0, 10}, {1, 4, 1, 0, 2}}));
  // Rank 2 has the middle; the rest comes from the lowest rank that has it.
  const std::vector<ShardMap> from = {ShardMap::of_ranges(10, {{0, 0, 7}}), ShardMap::of_ranges(10, {{5, 0, 5}}),
                                      ShardMap::of_ranges(10, {{3, 0, 3}})};
  const std::vector<ShardMap> last = {ShardMap::of_ranges(10, {}), ShardMap::of_ranges(10, {}), ShardMap::whole(10)};
  EXPECT_EQ(reshard_plan(from, last), (std::vector<Transfer>{{0, 0, 2, 0, 3}, {2, 0, 2, 3, 3}, {0, 6, 2, 6, 1}, {1, 2, 2, 7, 3}}));
}

TEST(Reshard, Errors) {
  const std::vector<ShardMap> hole = {ShardMap::of_ranges(4, {{0, 0, 2}, {3, 0, 1}})};
  const std::vector<ShardMap> all = {ShardMap::whole(4)};
  testing::expect_usage_error([&] { reshard_plan(hole, all); }, {"no rank holds element 2", "rank 0"});
  testing::expect_usage_error([&] { reshard_plan(all, std::vector<ShardMap>{ShardMap::whole(5)}); }, {"4 and 5 elements"});
  testing::expect_usage_error([&] { reshard_plan(all, std::vector<ShardMap>(2, all[0])); }, {"1 shards become 2"});
  run_ranks(1, [&](World& world) {
    const auto collectives = Collectives::create(world);
    std::vector<float> data(4);
    const TensorView right(data.data(), Dtype::float32, {4});
    testing::expect_usage_error([&] { reshard(*collectives, all, all, TensorView(data.data(), Dtype::float32, {3}), right); },
                                {"in is [3] float32", "4 elements"});
    testing::expect_usage_error([&] { reshard(*collectives, all, all, TensorView(data.data(), Dtype::int32, {4}), right); },
                                {"int32", "float32"});
  });
}

}  // namespace
}  // namespace tokenyard
