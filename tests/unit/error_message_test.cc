#include <gtest/gtest.h>

#include "tokenyard/error.h"

namespace tokenyard {
namespace {

TEST(FailureMessage, ATimeoutNamesRankPhaseCallPeerAndCounts) {
  const Failure failure{.kind = FailureKind::timeout,
                        .phase = Phase::dispatch_rows,
                        .rank = 2,
                        .peer = 0,
                        .epoch = 7,
                        .expected = 12,
                        .seen = 11,
                        .detail = "waited 5000 ms"};
  EXPECT_EQ("rank 2: timeout after waiting in dispatch_rows of call 7 for rank 0: expected 12, seen 11; waited 5000 ms", failure.message());
}

TEST(FailureMessage, OthersNameThePeer) {
  const Failure failure{.kind = FailureKind::peer_lost, .phase = Phase::barrier, .rank = 1, .peer = 3, .detail = "signal 9"};
  EXPECT_EQ("rank 1: peer_lost in barrier, peer rank 3; signal 9", failure.message());
}

TEST(FailureMessage, FieldsThatDoNotApplyAreLeftOut) {
  EXPECT_EQ("system", Failure{}.message());
  EXPECT_EQ("overflow: expected 8, seen 9", (Failure{.kind = FailureKind::overflow, .expected = 8, .seen = 9}).message());
}

TEST(FailureMessage, IsOneLine) { EXPECT_EQ("system; first second", (Failure{.detail = "first\nsecond"}).message()); }

TEST(FailureMessage, IsTheTextOfTheException) {
  const Failure failure{.kind = FailureKind::aborted, .rank = 0, .detail = "hidden_size 100"};
  const TransportError error(failure);
  EXPECT_EQ(failure.message(), error.what());
  EXPECT_EQ("hidden_size 100", error.failure().detail);
}

TEST(FailureNames, EveryKindAndPhase) {
  const std::pair<FailureKind, const char*> kinds[] = {{FailureKind::timeout, "timeout"},   {FailureKind::peer_lost, "peer_lost"},
                                                       {FailureKind::aborted, "aborted"},   {FailureKind::mismatch, "mismatch"},
                                                       {FailureKind::overflow, "overflow"}, {FailureKind::system, "system"}};
  for (const auto& [kind, text] : kinds) EXPECT_EQ(text, name(kind));
  const std::pair<Phase, const char*> phases[] = {
      {Phase::none, "none"},
      {Phase::rendezvous, "rendezvous"},
      {Phase::split, "split"},
      {Phase::gather, "gather"},
      {Phase::barrier, "barrier"},
      {Phase::recover, "recover"},
      {Phase::memory, "memory"},
      {Phase::dispatch_credit, "dispatch_credit"},
      {Phase::dispatch_counts, "dispatch_counts"},
      {Phase::dispatch_rows, "dispatch_rows"},
      {Phase::combine_weights, "combine_weights"},
      {Phase::combine_credit, "combine_credit"},
      {Phase::combine_rows, "combine_rows"},
      {Phase::combine_read, "combine_read"},
      {Phase::collective, "collective"},
  };
  for (const auto& [phase, text] : phases) EXPECT_EQ(text, name(phase));
}

}  // namespace
}  // namespace tokenyard
