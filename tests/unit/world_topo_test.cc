#include "tokenyard/topo.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "tokenyard/world.h"

namespace tokenyard {
namespace {

TEST(WorldTopo, WhatIsMissingSaysWhyAndWhatToDo) {
  std::set<std::pair<std::string, std::string>> seen;
  for (const Backend& backend : backends()) {
    EXPECT_TRUE(seen.emplace(backend.kind, backend.name).second) << backend.name;
    EXPECT_TRUE(std::set<std::string>({"memory", "collective", "port", "products"}).contains(backend.kind)) << backend.kind;
    EXPECT_EQ(backend.reason.empty(), backend.availability == Availability::available) << backend.name;
    EXPECT_EQ(backend.remedy.empty(), backend.availability == Availability::available) << backend.name;
  }
}

TEST(WorldTopo, WhatTheseTestsUseIsAvailable) {
  const auto all = backends();
  for (const char* name : {"inproc", "shm", "direct"}) {
    const auto at = std::find_if(all.begin(), all.end(), [&](const Backend& backend) { return backend.name == name; });
    ASSERT_NE(at, all.end()) << name;
    EXPECT_EQ(at->availability, Availability::available) << name << ": " << at->reason;
  }
}

TEST(WorldTopo, GpusAreThereWhenTheirMemoryIsAvailable) {
  const auto all = backends();
  const auto cuda_peer = std::find_if(all.begin(), all.end(), [&](const Backend& backend) { return backend.name == "cuda_peer"; });
  ASSERT_NE(cuda_peer, all.end());
  const GpuTopology found = gpu_topology();
  EXPECT_EQ(cuda_peer->availability == Availability::available, !found.gpus.empty());
  ASSERT_EQ(found.peer_access.size(), found.gpus.size());
  for (std::size_t gpu = 0; gpu < found.gpus.size(); ++gpu) {
    ASSERT_EQ(found.peer_access[gpu].size(), found.gpus.size());
    EXPECT_TRUE(found.peer_access[gpu][gpu]);
  }
}

TEST(WorldTopo, RankThreadsArePeersOfEachOther) {
  run_ranks(3, [](World& world) {
    const Topology topology = tokenyard::topology(world);
    EXPECT_EQ(topology.ranks, 3);
    ASSERT_EQ(topology.hosts.size(), 3U);
    ASSERT_EQ(topology.links.size(), 3U);
    for (int rank = 0; rank < 3; ++rank) {
      EXPECT_EQ(topology.hosts[rank], world.host(rank));
      ASSERT_EQ(topology.links[rank].size(), 3U);
      for (int peer = 0; peer < 3; ++peer) EXPECT_EQ(topology.links[rank][peer], rank == peer ? LinkKind::self : LinkKind::peer);
    }
  });
}

}  // namespace
}  // namespace tokenyard
