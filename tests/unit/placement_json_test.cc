// Placements as text and as hashes.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "unit/expect_usage_error.h"
#include "unit/placement_gen.h"

namespace tokenyard {
namespace {

using testing::PlacementParts;

bool equal(const Placement& a, const Placement& b) {
  if (a.ranks() != b.ranks() || a.num_experts() != b.num_experts()) return false;
  for (int expert = 0; expert < a.num_experts(); ++expert) {
    const auto x = a.replicas(expert);
    const auto y = b.replicas(expert);
    const auto same = [](const Replica& p, const Replica& q) { return p.shard_ranks == q.shard_ranks && p.share == q.share; };
    if (!std::equal(x.begin(), x.end(), y.begin(), y.end(), same)) return false;
  }
  return true;
}

TEST(PlacementJson, Spelling) {
  EXPECT_EQ(Placement::custom(3, {{{{0, 2}, 1}, {{1}, 4}}, {{{0}, 1}}}).to_json(),
            R"({"ranks":3,"experts":[[{"ranks":[0,2],"share":1},{"ranks":[1],"share":4}],[{"ranks":[0],"share":1}]]})");
}

TEST(PlacementJson, ShareIsOneUnlessGiven) {
  const Placement placement = Placement::from_json(R"( {"experts": [[{"ranks": [1]}]], "ranks": 2} )");
  EXPECT_TRUE(equal(placement, Placement::custom(2, {{{{1}, 1}}})));
}

RC_GTEST_PROP(PlacementJson, RoundTrip, ()) {
  const Placement placement = (*testing::any_parts()).build();
  const Placement again = Placement::from_json(placement.to_json());
  RC_ASSERT(equal(again, placement));
  RC_ASSERT(again.hash() == placement.hash());
  RC_ASSERT(again.to_json() == placement.to_json());
}

TEST(PlacementJson, FaultsNameTheirPlace) {
  struct Case {
    std::string_view text;
    std::initializer_list<std::string_view> parts;
  };
  const Case cases[] = {
      {"", {"not valid JSON"}},
      {"{", {"not valid JSON", "line 1"}},
      {R"({"ranks": 1, "experts": [[{"ranks": [0]}]]} x)", {"not valid JSON"}},
      {"\"\xff\"", {"not valid JSON"}},
      {"[]", {"placement = []", "expected an object"}},
      {R"({"experts": [[{"ranks": [0]}]]})", {"placement lacks the key \"ranks\""}},
      {R"({"ranks": 1})", {"placement lacks the key \"experts\""}},
      {R"({"ranks": 1, "experts": 3})", {"placement.experts = 3", "expected a list"}},
      {R"({"ranks": 1.5, "experts": [[{"ranks": [0]}]]})", {"placement.ranks = 1.5", "expected an integer"}},
      {R"({"ranks": true, "experts": [[{"ranks": [0]}]]})", {"placement.ranks = true", "expected an integer"}},
      {R"({"ranks": 99999999999, "experts": [[{"ranks": [0]}]]})", {"placement.ranks = 99999999999", "expected an integer"}},
      {R"({"ranks": 65536, "experts": [[{"ranks": [0]}]]})", {"ranks = 65536", "1..65535"}},
      {R"({"ranks": 1, "experts": []})", {"num_experts = 0"}},
      {R"({"ranks": 1, "experts": [], "name": "x"})", {"placement has the unknown key \"name\"", "experts", "ranks"}},
      {R"({"ranks": 1, "ranks": 2, "experts": []})", {"key \"ranks\" is given twice"}},
      {R"({"ranks": 1, "experts": [7]})", {"placement.experts[0] = 7", "expected a list"}},
      {R"({"ranks": 1, "experts": [[{"ranks": [0]}], [5]]})", {"placement.experts[1][0] = 5", "expected an object"}},
      {R"({"ranks": 1, "experts": [[{}]]})", {"placement.experts[0][0] lacks the key \"ranks\""}},
      {R"({"ranks": 1, "experts": [[{"ranks": 0}]]})", {"placement.experts[0][0].ranks = 0", "expected a list"}},
      {R"({"ranks": 1, "experts": [[{"ranks": [0], "shard": 1}]]})", {"placement.experts[0][0]", "\"shard\""}},
      {R"({"ranks": 2, "experts": [[{"ranks": [0, "1"]}]]})", {"placement.experts[0][0].ranks[1] = \"1\"", "expected an integer"}},
      {R"({"ranks": 2, "experts": [[{"ranks": [-99999999999]}]]})", {"placement.experts[0][0].ranks[0] = -99999999999"}},
      {R"({"ranks": 1, "experts": [[{"ranks": [0], "share": -1}]]})", {"placement.experts[0][0].share = -1", "1..65535"}},
      {R"({"ranks": 1, "experts": [[{"ranks": [0], "share": 65536}]]})", {"share = 65536", "1..65535"}},
      {R"({"ranks": 1, "experts": [[{"ranks": [1]}]]})", {"expert 0, replica 0, shard 0: rank = 1"}},
      {R"({"ranks": 1, "experts": [[{"ranks": [[0]]}]]})", {"nested deeper than 5"}},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.text);
    testing::expect_usage_error([&] { Placement::from_json(c.text); }, c.parts);
  }
}

TEST(PlacementJson, HostileTextIsCheapAndItsEchoShort) {
  testing::expect_usage_error([] { Placement::from_json(std::string(1'000'000, '[')); }, {"nested deeper"});
  try {
    Placement::from_json("{\"ranks\": \"" + std::string(100'000, 'x') + "\", \"experts\": []}");
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_LT(std::string_view(error.what()).size(), 200U);
  }
}

// Pinned: ranks built on different machines, by different compilers, compare these numbers.
TEST(PlacementHash, IsTheSameOnEveryMachine) {
  EXPECT_EQ(Placement::uniform(7, 3).hash(), 0xee2991652414b9ddU);
  EXPECT_EQ(Placement::tensor_parallel(4, 2, 2).hash(), 0x879c9ac901fc856cU);
}

RC_GTEST_PROP(PlacementHash, ChangesWithAnyChange, ()) {
  PlacementParts parts = *testing::any_parts();
  const Placement before = parts.build();
  PlacementParts more_ranks = parts;
  ++more_ranks.ranks;
  RC_ASSERT(more_ranks.build().hash() != before.hash());

  const auto expert = *rc::gen::inRange<std::size_t>(0, parts.replicas.size());
  const auto replica = *rc::gen::inRange<std::size_t>(0, parts.replicas[expert].size());
  PlacementParts share = parts;
  ++share.replicas[expert][replica].share;
  RC_ASSERT(share.build().hash() != before.hash());

  PlacementParts extra = more_ranks;  // the new rank takes a replica, a shard, or the place of another rank
  const Placement wider = more_ranks.build();
  extra.replicas[expert].push_back({{parts.ranks}, 1});
  RC_ASSERT(extra.build().hash() != wider.hash());
  extra = more_ranks;
  extra.replicas[expert][replica].shard_ranks.push_back(parts.ranks);
  RC_ASSERT(extra.build().hash() != wider.hash());
  extra = more_ranks;
  extra.replicas[expert][replica].shard_ranks[0] = parts.ranks;
  RC_ASSERT(extra.build().hash() != wider.hash());
  extra = parts;
  extra.replicas.push_back({{{0}, 1}});
  RC_ASSERT(extra.build().hash() != before.hash());
}

TEST(PlacementHash, BoundariesCount) {
  // The same ranks in the same order: two shards, two replicas, two experts.
  const std::uint64_t shards = Placement::custom(2, {{{{0, 1}, 1}}}).hash();
  const std::uint64_t replicas = Placement::custom(2, {{{{0}, 1}, {{1}, 1}}}).hash();
  const std::uint64_t experts = Placement::custom(2, {{{{0}, 1}}, {{{1}, 1}}}).hash();
  EXPECT_NE(shards, replicas);
  EXPECT_NE(shards, experts);
  EXPECT_NE(replicas, experts);
  EXPECT_NE(Placement::custom(2, {{{{1, 0}, 1}}}).hash(), shards);
}

}  // namespace
}  // namespace tokenyard
