// verify: a correctness matrix on this machine, one line per case.

#include "verify.h"

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <chrono>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "channel.h"
#include "command.h"
#include "core/usage.h"
#include "ranks.h"
#include "tokenyard/topo.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

struct VerifyCommand {
  VerifySettings settings;
  bool quick = false;
};

// Counts lines while it prints them.
class Report {
 public:
  void add(const std::string& transport, const VerifyLine& line) {
    ++count_[line.status];
    fmt::print("{:<7} {:<7} {}{}\n", line.status, transport, line.what, line.detail.empty() ? "" : ": " + line.detail);
    std::fflush(stdout);
  }
  int count(const std::string& status) const { return count_.contains(status) ? count_.at(status) : 0; }

 private:
  std::map<std::string, int> count_;
};

// Digests of sums by case, per transport.
using Digests = std::map<std::string, std::uint64_t>;

Digests run_matrix(VerifySettings settings, const std::string& transport, Runner runner, Report& report) {
  settings.transport = transport;
  // The last check of a case may wait for a peer that failed: the world's deadline is longer than the exchange's.
  const RankRun run = {
      .role = "verify", .ranks = settings.ranks, .runner = runner, .timeout_ms = 2 * settings.timeout_ms, .label = transport};
  Digests digests;
  json lines;
  try {
    lines = run_on_ranks(run, to_json(settings));
  } catch (const Error& failure) {
    report.add(transport, {"the ranks", "FAIL", failure.what(), 0});
    return digests;
  }
  for (const json& line : lines) {
    report.add(transport, verify_line_from_json(line));
    if (line["status"] == "ok") digests[line["what"]] = line["digest"];
  }
  return digests;
}

// Cases of one transport that must have the same bits.
void compare_cases(const VerifySettings& settings, const std::string& transport, const Digests& digests, Report& report) {
  VerifyLine line{"cases that must agree have the same bits (threads, modes, layouts, weightings)", "ok", "", 0};
  for (const VerifyCase& one : verify_cases(settings.ranks, 0, static_cast<std::uint64_t>(settings.seed))) {
    if (one.same_bits_as.empty() || !digests.contains(one.what) || !digests.contains(one.same_bits_as)) continue;
    if (digests.at(one.what) == digests.at(one.same_bits_as)) continue;
    line.status = "FAIL";
    line.detail = fmt::format("\"{}\" and \"{}\" differ", one.what, one.same_bits_as);
  }
  report.add(transport, line);
}

void compare_transports(const std::map<std::string, Digests>& all, Report& report) {
  const Digests& first = all.begin()->second;
  for (const auto& [transport, digests] : all) {
    if (transport == all.begin()->first) continue;
    VerifyLine line{fmt::format("the same bits as {} in every case", all.begin()->first), "ok", "", 0};
    for (const auto& [what, digest] : digests) {
      if (!first.contains(what) || first.at(what) == digest) continue;
      line.status = "FAIL";
      line.detail = what;
    }
    report.add(transport, line);
  }
}

// The others' error must name the rank that was killed.
void check_lost_rank(VerifySettings settings, Report& report) {
  VerifyLine line{"a killed rank is named by the others", "FAIL", "", 0};
  if (settings.ranks < 2) {
    report.add("shm", {line.what, "skipped", "needs two ranks; use --ranks 2", 0});
    return;
  }
  settings.lose_rank = true;
  const RankRun run = {
      .role = "verify", .ranks = settings.ranks, .runner = Runner::processes, .timeout_ms = settings.timeout_ms, .label = "shm"};
  const auto start = std::chrono::steady_clock::now();
  try {
    run_on_ranks(run, to_json(settings));
    line.detail = "no error";
  } catch (const Error& failure) {
    const std::string text = failure.what();
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start).count();
    const bool named = text.find("rank 0: peer_lost") != std::string::npos &&
                       text.find(fmt::format("peer rank {}", settings.ranks - 1)) != std::string::npos;
    line = {line.what, named && ms < settings.timeout_ms ? "ok" : "FAIL", named ? fmt::format("after {} ms", ms) : text, 0};
  }
  report.add("shm", line);
}

// The reason why MPI cannot be checked, or empty.
std::string why_no_mpi() {
  for (const Backend& backend : backends()) {
    if (backend.name != "mpi" || backend.availability != Availability::not_built) continue;
    return fmt::format("{}; {}", backend.reason, backend.remedy);
  }
  return find_mpirun().empty() ? "mpirun is not in PATH; install OpenMPI (apt-get install openmpi-bin)" : "";
}

void check(const VerifySettings& settings) {
  if (settings.ranks < 1 || settings.ranks > 16) usage_error("--ranks {}: out of range; give a number from 1 to 16", settings.ranks);
  if (settings.random < 0 || settings.random > 10'000)
    usage_error("--random {}: out of range; give a number from 0 to 10000", settings.random);
  if (settings.timeout_ms < 100) usage_error("--timeout-ms {}: too short; give at least 100", settings.timeout_ms);
}

void run_verify(VerifyCommand& command) {
  VerifySettings& settings = command.settings;
  if (command.quick) settings.random = 5;
  check(settings);
  const auto start = std::chrono::steady_clock::now();
  fmt::print("{} ranks, seed {}; every received row against its source bit for bit, sums of scaled rows exactly, weighted sums in double\n",
             settings.ranks, settings.seed);
  Report report;
  std::map<std::string, Digests> digests;
  digests["inproc"] = run_matrix(settings, "inproc", Runner::threads, report);
  digests["shm"] = run_matrix(settings, "shm", Runner::processes, report);
  if (const std::string reason = why_no_mpi(); reason.empty()) {
    digests["mpi"] = run_matrix(settings, "mpi", Runner::mpirun, report);
  } else {
    report.add("mpi", {"the matrix over MPI", "skipped", reason, 0});
  }
  for (const auto& [transport, of_transport] : digests) compare_cases(settings, transport, of_transport, report);
  compare_transports(digests, report);
  check_lost_rank(settings, report);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  fmt::print("{} ok, {} failed, {} skipped in {:.1f} s\n", report.count("ok"), report.count("FAIL"), report.count("skipped"), seconds);
  if (report.count("FAIL") > 0) {
    throw Error(fmt::format("{} checks failed, see above; run again with --seed {}{}", report.count("FAIL"), settings.seed,
                            settings.dump ? "" : " --dump"));
  }
}

}  // namespace

void add_verify(CLI::App& program) {
  CLI::App* app = program.add_subcommand("verify", "Run a correctness matrix on this machine, one line per check");
  auto command = std::make_shared<VerifyCommand>();
  VerifySettings& settings = command->settings;
  app->add_option("--ranks", settings.ranks, "Number of ranks")->capture_default_str();
  app->add_option("--random", settings.random, "Random cases per transport")->capture_default_str();
  app->add_option("--seed", settings.seed, "Seed of rows, routing and random cases")->capture_default_str();
  app->add_option("--timeout-ms", settings.timeout_ms, "Deadline of every wait")->capture_default_str();
  app->add_flag("--quick", command->quick, "Few random cases");
  app->add_flag("--dump", settings.dump, "Show the first differing row of a failure: rank, slot, both values");
  app->add_flag("--self-test", settings.self_test, "Flip one bit of a received row, to see that it is found");
  app->footer(
      "Examples:\n"
      "  tokenyard verify\n"
      "  tokenyard verify --quick --ranks 3\n"
      "  tokenyard verify --seed 7 --random 200 --dump");
  app->callback([command] { run_verify(*command); });
}

}  // namespace tokenyard::cli
