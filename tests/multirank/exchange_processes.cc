#include "multirank/exchange_processes.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <exception>
#include <filesystem>
#include <map>

namespace tokenyard::exchange_test {
namespace {

constexpr const char* kBodyVariable = "TOKENYARD_TEST_BODY";
constexpr const char* kArgumentVariable = "TOKENYARD_TEST_ARGUMENT";

std::map<std::string, Body>& bodies() {
  static std::map<std::string, Body> map;
  return map;
}

void run_body(const std::string& name) {
  const char* argument = std::getenv(kArgumentVariable);
  try {
    World world = World::from_env();
    bodies().at(name)(world, argument == nullptr ? "" : argument);
  } catch (const std::exception& error) {
    ADD_FAILURE() << "body " << name << " " << (argument == nullptr ? "" : argument) << ": " << error.what();
  }
}

// Set up before the first test: in a rank process it takes the place of all tests.
class RankProcess : public testing::Environment {
 public:
  void SetUp() override {
    const char* name = std::getenv(kBodyVariable);
    if (name == nullptr) return;
    run_body(name);
    std::exit(testing::UnitTest::GetInstance()->Failed() ? 1 : 0);
  }
};

const testing::Environment* const kRankProcess = testing::AddGlobalTestEnvironment(new RankProcess);  // owned by gtest

}  // namespace

RegisterBody::RegisterBody(const char* name, Body body) { bodies()[name] = body; }

std::vector<RankExit> run_processes(const ProcessRun& run) {
  const testing::TestInfo* test = testing::UnitTest::GetInstance()->current_test_info();
  LaunchOptions options;
  options.ranks = run.ranks;
  options.argv = {std::filesystem::read_symlink("/proc/self/exe").string(),
                  std::string("--gtest_filter=") + test->test_suite_name() + "." + test->name(), "--gtest_brief=1"};
  options.env = {{kBodyVariable, run.body}, {kArgumentVariable, run.argument}};
  options.timeout_ms = run.timeout_ms;
  options.run_timeout_ms = run.run_timeout_ms;
  options.on_start = run.on_start;
  return launch(options);
}

}  // namespace tokenyard::exchange_test
