#include "core/env.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "expect_usage_error.h"

namespace tokenyard {
namespace {

constexpr const char* kName = "TOKENYARD_TEST_VARIABLE";

class Env : public ::testing::Test {
 protected:
  void TearDown() override { unsetenv(kName); }
  static void set(const char* text) { setenv(kName, text, 1); }
};

TEST_F(Env, UnsetIsNothing) {
  EXPECT_EQ(std::nullopt, env(kName));
  EXPECT_EQ(std::nullopt, env_int(kName, 0, 9));
}

TEST_F(Env, TextAsItIs) {
  set(" a b ");
  EXPECT_EQ(" a b ", env(kName));
  set("");
  EXPECT_EQ("", env(kName));
}

TEST_F(Env, IntegersUpToTheBounds) {
  for (const auto& [text, value] : {std::pair("-5", -5), {"0", 0}, {"07", 7}, {"65535", 65535}}) {
    set(text);
    EXPECT_EQ(value, env_int(kName, -5, 65535)) << text;
  }
}

TEST_F(Env, AnythingElseIsNamed) {
  for (const char* text : {"", "x", "7x", " 7", "7 ", "0x7", "1.5", "10", "-1", "99999999999999999999"}) {
    set(text);
    testing::expect_usage_error([] { env_int(kName, 0, 9); }, {kName, text, "from 0 to 9"});
  }
}

}  // namespace
}  // namespace tokenyard
