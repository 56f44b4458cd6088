#include "machine.h"

#include <fmt/core.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "revision.h"

namespace tokenyard::cli {
namespace {

std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

std::string first_line_of(const std::string& command) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> pipe(::popen(command.c_str(), "r"), ::pclose);
  char line[256] = {};
  if (!pipe || !std::fgets(line, sizeof line, pipe.get())) return "unknown";
  std::string text = line;
  text.erase(text.find_last_not_of('\n') + 1);
  return text;
}

}  // namespace

nlohmann::json machine() {
  utsname kernel{};
  ::uname(&kernel);
  return {{"cpu", cpu_model()},
          {"cores", std::thread::hardware_concurrency()},
          {"memory_bytes", static_cast<std::int64_t>(::sysconf(_SC_PHYS_PAGES)) * ::sysconf(_SC_PAGESIZE)},
          {"kernel", fmt::format("{} {} {}", kernel.sysname, kernel.release, kernel.machine)}};
}

nlohmann::json versions(const std::string& mpirun) {
#ifdef __clang__
  const std::string compiler = __VERSION__;
#else
  const std::string compiler = std::string("GCC ") + __VERSION__;
#endif
  nlohmann::json all = {{"tokenyard", kVersion}, {"git_revision", kGitRevision}, {"build_type", kBuildType}, {"compiler", compiler}};
  if (!mpirun.empty()) all["mpi"] = first_line_of("'" + mpirun + "' --version 2>&1");
  return all;
}

}  // namespace tokenyard::cli
