#pragma once
// The correctness matrix of `verify`: what is run, the same on every transport.

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "tokenyard/exchange.h"
#include "workload.h"

namespace tokenyard::cli {

struct VerifyCase {
  std::string what;
  Workload workload;
  std::string placement = "uniform";  // "uniform", "tensor parallel", "replicated", "custom"
  Mode mode = Mode::throughput;
  DispatchOptions dispatch = {};
  Weighting weighting = Weighting::none;
  Order order = Order::rank_ascending;
  int threads = 1;
  std::string same_bits_as = {};  // another case, whose sums must have the same bits
};

// The fixed cases, then `random` drawn ones. Everything follows from the arguments.
std::vector<VerifyCase> verify_cases(int ranks, int random, std::uint64_t seed);
Placement placement_of(const VerifyCase& one);

struct VerifySettings {
  int ranks = 4;
  int random = 40;
  std::int64_t seed = 1;
  int timeout_ms = 20'000;
  bool dump = false;
  bool self_test = false;         // flip one bit of a received row: the matrix must find it
  std::string transport = "shm";  // filled in for each transport in turn
  bool lose_rank = false;         // instead of the matrix: the last rank kills itself
};
nlohmann::json to_json(const VerifySettings& settings);
VerifySettings verify_settings_from_json(const nlohmann::json& settings);

// One line of the report. digest: of the sums' bits, 0 when there are none.
struct VerifyLine {
  std::string what;
  std::string status;  // "ok", "FAIL", "skipped"
  std::string detail;
  std::uint64_t digest = 0;
};
nlohmann::json to_json(const VerifyLine& line);
VerifyLine verify_line_from_json(const nlohmann::json& line);

}  // namespace tokenyard::cli
