// A caller may give up a wait of this thread.

#include "core/interrupt.h"

#include <gtest/gtest.h>

#include <thread>

#include "tokenyard/error.h"
#include "tokenyard/world.h"

namespace tokenyard {
namespace {

bool never() { return false; }
bool always() { return true; }

TEST(Interrupt, IsAskedInItsScopeAndThreadOnly) {
  EXPECT_FALSE(is_interruptible());
  EXPECT_FALSE(interrupted());
  const InterruptScope outer(always);
  EXPECT_TRUE(interrupted());
  {
    const InterruptScope inner(never);
    EXPECT_TRUE(is_interruptible());
    EXPECT_FALSE(interrupted());
  }
  EXPECT_TRUE(interrupted());
  std::jthread([] { EXPECT_FALSE(is_interruptible()); }).join();
}

TEST(Interrupt, EndsAWaitForRankThreadsAndTheyLearnOfIt) {
  const auto worlds = World::in_process(2, /*timeout_ms=*/60'000);
  const InterruptScope scope(always);
  try {
    worlds[0].barrier();
    FAIL() << "the barrier of one rank of two ended";
  } catch (const TransportError& error) {
    EXPECT_NE(error.failure().message().find(kInterrupted), std::string::npos) << error.what();
  }
  EXPECT_THROW(worlds[1].barrier(), TransportError);
}

}  // namespace
}  // namespace tokenyard
