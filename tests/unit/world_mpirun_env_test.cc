// Under mpirun, its variables stand in for RANK, WORLD_SIZE and LOCAL_RANK.

#include <gtest/gtest.h>
#include <stdlib.h>

#include "expect_usage_error.h"
#include "tokenyard/world.h"

namespace tokenyard {
namespace {

// Sets variables for one test; ctest runs every test in a process of its own, so nothing else sees them.
void set(const char* name, const char* value) { ASSERT_EQ(setenv(name, value, 1), 0); }

TEST(WorldMpirunEnv, ItsRankAndSizeAreTaken) {
  set("OMPI_COMM_WORLD_RANK", "3");
  set("OMPI_COMM_WORLD_SIZE", "2");
  set("TOKENYARD_PORT", "1");
  testing::expect_usage_error([] { World::from_env(); }, {"rank 3", "2 ranks"});
}

TEST(WorldMpirunEnv, OurOwnComeFirst) {
  set("OMPI_COMM_WORLD_RANK", "3");
  set("OMPI_COMM_WORLD_SIZE", "2");
  set("RANK", "0");
  set("WORLD_SIZE", "1");
  EXPECT_EQ(World::from_env().size(), 1);
}

}  // namespace
}  // namespace tokenyard
