#pragma once
// Rank processes for tests: this test program again, started by the launcher, running a named body instead of tests.

#include <functional>
#include <string>
#include <vector>

#include "tokenyard/launch.h"
#include "tokenyard/world.h"

namespace tokenyard::exchange_test {

// What a rank process does; gtest failures in it, and exceptions, become exit code 1. A static object per body, in the file of its tests.
using Body = void (*)(World& world, const std::string& argument);
struct RegisterBody {
  RegisterBody(const char* name, Body body);
};

struct ProcessRun {
  std::string body;
  std::string argument = {};
  int ranks = 2;
  int timeout_ms = 60'000;       // of the ranks' waits
  int run_timeout_ms = 240'000;  // of the whole run
  std::function<void(int rank, int pid)> on_start = {};
};
std::vector<RankExit> run_processes(const ProcessRun& run);

}  // namespace tokenyard::exchange_test
