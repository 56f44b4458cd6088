#include "core/log.h"

#include <gtest/gtest.h>

#include "core/env.h"

namespace tokenyard {
namespace {

TEST(Log, ByDefaultOnlyWarningsReachStderr) {
  if (env("TOKENYARD_LOG")) GTEST_SKIP() << "TOKENYARD_LOG is set";
  ::testing::internal::CaptureStderr();
  log_info("note {}", 1);
  log_warn("careful {}", 2);
  const std::string text = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::string::npos, text.find("note 1")) << text;
  EXPECT_NE(std::string::npos, text.find("[tokenyard] [warning] careful 2\n")) << text;
}

}  // namespace
}  // namespace tokenyard
