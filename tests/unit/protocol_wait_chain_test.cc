// Whom a rank blames whose wait has timed out.

#include "protocol/wait_chain.h"

#include <gtest/gtest.h>

#include <vector>

namespace tokenyard::protocol {
namespace {

int blamed(int rank, int peer, const std::vector<int>& waiting_on) {
  return end_of_chain(rank, static_cast<int>(waiting_on.size()), peer, [&](int at) { return waiting_on[at]; });
}

TEST(ProtocolWaitChain, EndsAtWhoeverWaitsForNobody) {
  EXPECT_EQ(blamed(0, 1, {1, 2, 3, -1}), 3);
  EXPECT_EQ(blamed(0, 3, {3, 2, -1, -1}), 3);
}
TEST(ProtocolWaitChain, ThePeerIsToBlameInACircleThroughThisRank) { EXPECT_EQ(blamed(0, 1, {1, 2, 0}), 1); }
TEST(ProtocolWaitChain, ThePeerIsToBlameInACircleOfOthers) { EXPECT_EQ(blamed(0, 1, {1, 2, 3, 2}), 1); }
TEST(ProtocolWaitChain, ARankThatWaitsForItselfIsItsEnd) { EXPECT_EQ(blamed(0, 1, {1, 2, 2}), 2); }

}  // namespace
}  // namespace tokenyard::protocol
