#include "core/usage.h"

#include <gtest/gtest.h>

#include "core/expected.h"
#include "expect_usage_error.h"

namespace tokenyard {
namespace {

TEST(Usage, TextIsFormatted) {
  testing::expect_usage_error([] { usage_error("top_k = {}; expected at most {}", 65, 64); }, {"top_k = 65; expected at most 64"});
}

TEST(Usage, ABrokenInvariantIsALogicErrorThatSaysWhere) {
  EXPECT_NO_THROW(TY_ASSERT(1 + 1 == 2));
  try {
    TY_ASSERT(1 + 1 == 3);
    FAIL() << "no exception";
  } catch (const std::logic_error& error) {
    const std::string text = error.what();
    EXPECT_NE(std::string::npos, text.find("core_usage_test.cc:")) << text;
    EXPECT_NE(std::string::npos, text.find("1 + 1 == 3")) << text;
  }
}

TEST(Expected, AFailureBecomesATransportErrorAtTheEdge) {
  EXPECT_EQ(7, value_or_throw(Expected<int>(7)));
  EXPECT_NO_THROW(value_or_throw(Expected<void>()));
  try {
    value_or_throw(Expected<int>(unexpected({.kind = FailureKind::peer_lost, .rank = 1, .peer = 3})));
    FAIL() << "no exception";
  } catch (const TransportError& error) {
    EXPECT_EQ(FailureKind::peer_lost, error.failure().kind);
    EXPECT_EQ(3, error.failure().peer);
    EXPECT_EQ(error.failure().message(), error.what());
  }
}

}  // namespace
}  // namespace tokenyard
