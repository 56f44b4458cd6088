// launch: the user's own program as ranks on this host.

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <cstring>
#include <memory>

#include "command.h"
#include "core/usage.h"
#include "tokenyard/error.h"
#include "tokenyard/launch.h"

namespace tokenyard::cli {
namespace {

void run_launch(const LaunchOptions& options) {
  if (options.ranks < 1) usage_error("--ranks {}: give at least 1", options.ranks);
  if (options.timeout_ms < 1) usage_error("--timeout-ms {}: give at least 1", options.timeout_ms);
  if (options.run_timeout_ms < 0) usage_error("--run-timeout-ms {}: give a time in milliseconds, or 0 for none", options.run_timeout_ms);
  std::string failures;
  for (const RankExit& exit : launch(options)) {
    if (exit.exit_code == 0) continue;
    failures += fmt::format("{}rank {} ", failures.empty() ? "" : ", ", exit.rank);
    failures += exit.signal != 0 ? fmt::format("was ended by signal {} ({})", exit.signal, ::strsignal(exit.signal))
                                 : fmt::format("ended with exit code {}", exit.exit_code);
  }
  if (!failures.empty()) throw Error(failures + "; their output is above");
}

}  // namespace

void add_launch(CLI::App& program) {
  CLI::App* app = program.add_subcommand("launch", "Start a program of yours as several ranks on this host");
  auto options = std::make_shared<LaunchOptions>();
  options->ranks = 2;
  app->add_option("-n,--ranks", options->ranks, "Number of ranks")->capture_default_str();
  app->add_option("--timeout-ms", options->timeout_ms, "Deadline of the ranks' waits")->capture_default_str();
  app->add_option("--run-timeout-ms", options->run_timeout_ms, "End all ranks after this time; 0: never")->capture_default_str();
  app->add_flag("!--no-prefix", options->prefix_output, "Do not write \"[rank 2] \" before every line");
  app->add_option("PROGRAM", options->argv, "Program and arguments, after --")->required();
  app->footer(
      "Each rank gets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, TOKENYARD_PORT and TOKENYARD_STORE, which World::from_env() reads.\n\n"
      "Examples:\n"
      "  tokenyard launch -n 4 -- ./my_program --its-option\n"
      "  tokenyard launch -n 2 --run-timeout-ms 60000 -- python3 train.py");
  app->callback([options] { run_launch(*options); });
}

}  // namespace tokenyard::cli
