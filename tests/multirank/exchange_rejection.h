#pragma once
// What a call with wrong arguments must lead to: a UsageError that says what is wrong, and the same reason on the other ranks.

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "tokenyard/error.h"
#include "tokenyard/world.h"

namespace tokenyard::exchange_test {

// `text` is a part of what the error says.
inline void expect_usage_error(const std::string& text, const std::function<void()>& bad) {
  try {
    bad();
    ADD_FAILURE() << "no error; expected one with '" << text << "'";
  } catch (const UsageError& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what() << "\nexpected '" << text << "'";
  }
}

// A call of this rank that `culprit` rejected.
inline void expect_aborted(const World& world, int culprit, const std::string& text, const std::function<void()>& good) {
  try {
    good();
    ADD_FAILURE() << "rank " << world.rank() << " did not fail a call that rank " << culprit << " rejected: " << text;
  } catch (const TransportError& error) {
    EXPECT_EQ(error.failure().kind, FailureKind::aborted) << error.what();
    EXPECT_EQ(error.failure().peer, culprit) << error.what();
    EXPECT_EQ(error.failure().rank, world.rank()) << error.what();
    EXPECT_NE(error.failure().detail.find(text), std::string::npos) << error.what() << "\nexpected '" << text << "'";
  }
}

// Runs `bad` on the culprit and `good` on its peers, at the same time.
inline void expect_rejection(const World& world, int culprit, const std::string& text, const std::function<void()>& good,
                             const std::function<void()>& bad) {
  if (world.rank() == culprit)
    expect_usage_error(text, bad);
  else
    expect_aborted(world, culprit, text, good);
}

}  // namespace tokenyard::exchange_test
