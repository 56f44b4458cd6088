// Instead of the benchmarks, where they are not built.

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "command.h"
#include "core/usage.h"
#include "ranks.h"

namespace tokenyard::cli {
namespace {

[[noreturn]] void refuse() { usage_error("bench: this build of tokenyard has no benchmarks; configure it with -DTY_BENCH=ON"); }

}  // namespace

void add_bench(CLI::App& program) {
  CLI::App* app = program.add_subcommand("bench", "Not in this build; configure it with -DTY_BENCH=ON");
  app->allow_extras();  // whatever was asked of it, the answer is the same
  app->callback(refuse);
}

nlohmann::json bench_role(const World& /*world*/, const nlohmann::json& /*settings*/, Progress& /*progress*/) { refuse(); }

}  // namespace tokenyard::cli
