// Who is who: coordinates, and the worlds they name.

#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "tokenyard/parallel.h"
#include "tokenyard/placement.h"
#include "tokenyard/world.h"
#include "unit/expect_usage_error.h"

namespace tokenyard {
namespace {

constexpr SubWorld kKinds[] = {SubWorld::attention, SubWorld::ep, SubWorld::tp, SubWorld::ep_tp, SubWorld::outer};

TEST(ParallelRanks, CoordinatesOfAKnownConfiguration) {
  const ParallelConfig config = solve_parallel({.nnodes = 2, .device_count = 16, .dp = 4, .tp = 4, .ep = 4, .outer_dp = 2});
  EXPECT_EQ(config.attn_dp, 2);
  EXPECT_EQ(config.attn_tp, 4);
  EXPECT_EQ(config.mlp_tp, 2);
  EXPECT_EQ(config.coordinates(0), (RankCoordinates{}));
  EXPECT_EQ(config.coordinates(5), (RankCoordinates{.rank = 5, .attn_dp = 1, .attn_tp = 1, .ep = 2, .mlp_tp = 1}));
  EXPECT_EQ(config.coordinates(15), (RankCoordinates{15, 1, 1, 1, 3, 0, 3, 1}));
  const ParallelConfig context = solve_parallel({.tp = 4, .ep = 8, .cp = 2});
  EXPECT_EQ(context.coordinates(5), (RankCoordinates{.rank = 5, .attn_tp = 2, .attn_cp = 1, .ep = 5}));
}

// Over many configurations: coordinates are a numbering in mixed radix, and every kind of world is a partition.
TEST(ParallelRanks, EveryRankIsInOneWorldOfEachKind) {
  for (const int devices : {1, 2, 4, 6, 8, 12, 16, 24, 64}) {
    for (const int ep : {1, 2, 3, 4, 8}) {
      for (const int outer_dp : {1, 2, 3}) {
        for (const int cp : {1, 2}) {
          ParallelConfig config;
          try {
            config = solve_parallel({.device_count = devices, .ep = ep, .cp = cp, .outer_dp = outer_dp});
          } catch (const UsageError&) {
            continue;
          }
          SCOPED_TRACE(config.to_json());
          for (int rank = 0; rank < devices; ++rank) {
            const RankCoordinates at = config.coordinates(rank);
            EXPECT_EQ(((at.outer * config.attn_dp + at.attn_dp) * config.attn_tp + at.attn_tp) * config.attn_cp + at.attn_cp, rank);
            EXPECT_EQ((at.outer * config.ep + at.ep) * config.mlp_tp + at.mlp_tp, rank);
          }
          for (const SubWorld kind : kKinds) {
            std::map<int, std::set<int>> keys;
            for (int rank = 0; rank < devices; ++rank) {
              const SplitArguments at = config.split_arguments(kind, rank);
              EXPECT_TRUE(keys[at.color].insert(at.key).second);
            }
            EXPECT_EQ(std::ssize(keys) * config.sub_world_size(kind), devices) << name(kind);
            for (const auto& [color, members] : keys) {
              EXPECT_TRUE(color >= 0 && color < std::ssize(keys));
              EXPECT_EQ(std::ssize(members), config.sub_world_size(kind));
              EXPECT_EQ(*members.rbegin(), config.sub_world_size(kind) - 1);
            }
          }
        }
      }
    }
  }
}

TEST(ParallelRanks, SplitMakesTheWorldsThatTheCoordinatesName) {
  const ParallelConfig config = solve_parallel({.device_count = 8, .ep = 2, .outer_dp = 2});
  ASSERT_EQ(config.mlp_tp, 2);
  run_ranks(8, [&](World& world) {
    const RankCoordinates me = config.coordinates(world.rank());
    std::map<SubWorld, std::pair<int, int>> sizes;
    for (const SubWorld kind : kKinds) {
      const SplitArguments at = config.split_arguments(kind, world.rank());
      const std::optional<World> mine = world.split(at.color, at.key);
      ASSERT_TRUE(mine.has_value());
      sizes[kind] = {mine->size(), mine->rank()};
    }
    EXPECT_EQ(sizes[SubWorld::ep_tp], std::pair(4, me.ep * 2 + me.mlp_tp));
    EXPECT_EQ(sizes[SubWorld::ep], std::pair(2, me.ep));
    EXPECT_EQ(sizes[SubWorld::tp], std::pair(2, me.mlp_tp));
    EXPECT_EQ(sizes[SubWorld::outer], std::pair(2, me.outer));
    EXPECT_EQ(sizes[SubWorld::attention], std::pair(4, me.attn_tp));
  });
}

// A rank's place in its ep_tp world is its rank in the placement of the experts.
TEST(ParallelRanks, PlacementFollowsTheCoordinates) {
  const ParallelConfig config = solve_parallel({.tp = 8, .ep = 4});
  const Placement placement = Placement::tensor_parallel(10, config.ep, config.mlp_tp);
  for (const Instance& instance : placement.instances()) {
    const RankCoordinates at = config.coordinates(instance.rank);
    EXPECT_EQ(at.mlp_tp, instance.shard);
    EXPECT_EQ(config.split_arguments(SubWorld::ep_tp, instance.rank).key, instance.rank);
  }
}

TEST(ParallelRanks, JsonHasTheNamesOfTheSpecification) {
  const auto json = nlohmann::json::parse(solve_parallel({.nnodes = 2, .tp = 8, .ep = 4}).to_json());
  EXPECT_EQ(json.at("nnodes"), 2);
  EXPECT_EQ(json.at("device_count"), 8);
  for (const char* key : {"dp", "cp", "outer_dp", "attn_dp", "attn_cp"}) EXPECT_EQ(json.at(key), 1) << key;
  for (const char* key : {"tp", "attn_tp"}) EXPECT_EQ(json.at(key), 8) << key;
  EXPECT_EQ(json.at("ep"), 4);
  EXPECT_EQ(json.at("mlp_tp"), 2);
  ASSERT_EQ(json.at("ranks").size(), 8U);
  EXPECT_EQ(json["ranks"][5], nlohmann::json::parse(R"({"rank": 5, "node": 1, "outer": 0, "attn_dp": 0, "attn_tp": 5, "attn_cp": 0,
                                                        "ep": 2, "mlp_tp": 1})"));
}

TEST(ParallelRanks, WrongArguments) {
  const ParallelConfig config = solve_parallel({.tp = 8, .ep = 4});
  testing::expect_usage_error([&] { config.coordinates(8); }, {"rank = 8", "0..7"});
  testing::expect_usage_error([&] { config.split_arguments(SubWorld::ep, -1); }, {"rank = -1"});
  testing::expect_usage_error([] { ParallelConfig{.nnodes = 2}.coordinates(0); }, {"device_count = 1 is no multiple of nnodes = 2"});
}

}  // namespace
}  // namespace tokenyard
