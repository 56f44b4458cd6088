// tokenyard: the command line. Exit codes: 0 ok, 1 operating failure, 2 usage.

#include <fmt/core.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>

#include "command.h"
#include "ranks.h"
#include "revision.h"
#include "tokenyard/error.h"

namespace tokenyard::cli {
namespace {

int fail(int exit_code, std::string reason) {
  std::replace(reason.begin(), reason.end(), '\n', ' ');
  std::fflush(stdout);
  fmt::print(stderr, "error: {}\n", reason);
  return exit_code;
}

void add_commands(CLI::App& program) {
  program.require_subcommand(1);
  program.set_version_flag("--version", fmt::format("tokenyard {} ({})", kVersion, kGitRevision));
  program.footer(
      "Examples:\n"
      "  tokenyard demo                          a real text through an MoE layer on 4 processes, verified\n"
      "  tokenyard bench --ranks 2 --tokens 256  how fast dispatch and combine are here\n"
      "  tokenyard verify                        check this machine\n"
      "  tokenyard COMMAND --help                options and examples of one command\n"
      "Exit codes: 0 ok, 1 operating failure, 2 wrong usage.");
  add_demo(program);
  add_bench(program);
  add_verify(program);
  add_topo(program);
  add_parallel(program);
  add_plan_memory(program);
  add_launch(program);
}

// The innermost command that was named: where the user looks for help.
std::string help_of(const CLI::App& program) {
  std::string command = "tokenyard";
  const CLI::App* app = &program;
  while (!app->get_subcommands().empty()) {
    app = app->get_subcommands().front();
    command += " " + app->get_name();
  }
  return command + " --help";
}

// CLI11 would only say that some command is missing.
void refuse_unknown_command(const CLI::App& program, int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return;
  std::string known;
  for (const CLI::App* command : program.get_subcommands([](const CLI::App*) { return true; })) {
    if (command->get_name() == argv[1]) return;
    known += (known.empty() ? "" : ", ") + command->get_name();
  }
  throw UsageError(fmt::format("unknown command \"{}\"; known: {}; see 'tokenyard --help'", argv[1], known));
}

int run(int argc, char** argv) {
  CLI::App program("Tokenyard: expert-parallel dispatch and combine", "tokenyard");
  try {
    add_commands(program);
    refuse_unknown_command(program, argc, argv);
    program.parse(argc, argv);
    return 0;
  } catch (const CLI::Success& asked) {  // --help, --version
    return program.exit(asked);
  } catch (const CLI::ParseError& wrong) {
    return fail(2, fmt::format("{}; see '{}'", wrong.what(), help_of(program)));
  } catch (const UsageError& wrong) {
    return fail(2, wrong.what());
  } catch (const std::exception& failure) {
    return fail(1, failure.what());
  }
}

}  // namespace
}  // namespace tokenyard::cli

int main(int argc, char** argv) {
  try {
    if (tokenyard::cli::is_rank_process(argc, argv)) return tokenyard::cli::rank_process(argc, argv);
    return tokenyard::cli::run(argc, argv);
  } catch (const std::exception& failure) {  // of a rank without a channel to answer on, or of printing an error
    std::fprintf(stderr, "error: %s\n", failure.what());
    return 1;
  }
}
