#include "core/log.h"

#include <gtest/gtest.h>

#include "core/env.h"

namespace tokenyard {
namespace {

TEST(Log, ByDefaultOnlyWarningsReachStderr) {
  if (env("TOKENYARD_LOG")) GTEST_SKIP() << "TOKENYARD_LOG is set";
  ::testing::internal::CaptureStderr();
  log_debug("fine {}", 1);
  log_info("note {}", 2);
  log_warn("careful {}", 3);
  const std::string text = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::string::npos, text.find("fine 1")) << text;
  EXPECT_EQ(std::string::npos, text.find("note 2")) << text;
  EXPECT_NE(std::string::npos, text.find("[tokenyard] [warning] careful 3\n")) << text;
}

}  // namespace
}  // namespace tokenyard
