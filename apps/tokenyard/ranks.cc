#include "ranks.h"

#include <arpa/inet.h>
#include <fmt/core.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <exception>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <thread>

#include "channel.h"
#include "core/env.h"
#include "core/usage.h"
#include "tokenyard/launch.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

constexpr const char* kRankArgument = "as-rank";

// CBOR: unlike JSON's text it carries any bytes, and numbers exactly.
std::string pack(const json& value) {
  std::string text;
  json::to_cbor(value, text);
  return text;
}
json unpack(const std::string& text) { return json::from_cbor(text); }

Role role_named(const std::string& name) {
  if (name == "demo") return demo_role;
  if (name == "bench") return bench_role;
  if (name == "bench_cuda") return bench_cuda_role;
  if (name == "bench_collective") return bench_collective_role;
  if (name == "bench_layer") return bench_layer_role;
  if (name == "verify") return verify_role;
  TY_ASSERT(name == "topo");
  return topo_role;
}

// Between choosing and using, another program may take the port: the run then fails with an error that says so.
int free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  const bool bound = fd >= 0 && ::bind(fd, reinterpret_cast<sockaddr*>(&address), length) == 0 &&
                     ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0;
  if (fd >= 0) ::close(fd);
  if (!bound) throw Error(fmt::format("no free TCP port on 127.0.0.1: {}", std::strerror(errno)));
  return ntohs(address.sin_port);
}

std::vector<std::string> rank_command(const RankRun& run, const Channel& channel, int port) {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  return {self, kRankArgument, run.role, channel.path(), std::to_string(port), std::to_string(run.timeout_ms)};
}

// One mpirun under our launcher, so that it ends when we do. --bind-to none: ranks and their threads use all cores, as under our launcher.
LaunchOptions mpirun_options(const RankRun& run, const Channel& channel) {
  std::vector<std::string> argv = {find_mpirun(), "-n", std::to_string(run.ranks), "--oversubscribe", "--bind-to", "none"};
  if (::geteuid() == 0) argv.emplace_back("--allow-run-as-root");
  // Waiting MPI ranks give way when ranks outnumber cores: without it the baseline would look worse than it is.
  if (run.ranks > static_cast<int>(std::thread::hardware_concurrency())) argv.insert(argv.end(), {"--mca", "mpi_yield_when_idle", "1"});
  for (std::string& word : rank_command(run, channel, free_port())) argv.push_back(std::move(word));
  return {.ranks = 1, .argv = std::move(argv), .prefix_output = false, .timeout_ms = run.timeout_ms};
}

// The sentence about ranks that a signal ended, if any.
std::string killed_ranks(const std::vector<RankExit>& exits) {
  std::string text;
  for (const RankExit& exit : exits) {
    if (exit.signal != 0) text += fmt::format("rank {} was ended by signal {} ({}); ", exit.rank, exit.signal, ::strsignal(exit.signal));
  }
  return text;
}

// Throws what the ranks failed with. A usage error is the cause of the others' failures, so it comes first.
void rethrow_failures(const RankRun& run, const std::vector<json>& answers, const std::vector<RankExit>& exits) {
  for (const json& answer : answers) {
    if (answer.value("usage", false)) throw UsageError(answer["error"].get<std::string>());
  }
  const std::string killed = killed_ranks(exits);
  for (int rank = 0; rank < run.ranks; ++rank) {
    if (!answers[rank].contains("error")) continue;
    const std::string reason = answers[rank]["error"];
    throw Error(killed + (reason.starts_with("rank ") ? reason : fmt::format("rank {}: {}", rank, reason)));
  }
  if (!killed.empty()) throw Error(killed + "no other rank noticed");
  for (const RankExit& exit : exits) {
    if (exit.exit_code != 0) {
      throw Error(fmt::format("{} ended with exit code {} before the ranks answered; its output is above",
                              run.runner == Runner::mpirun ? "mpirun" : fmt::format("rank {}", exit.rank), exit.exit_code));
    }
  }
}

// Products start a thread per core unless told otherwise, in every process: together far more than there are cores.
std::vector<std::pair<std::string, std::string>> thread_environment(int ranks) {
  if (env("OMP_NUM_THREADS")) return {};
  const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  return {{"OMP_NUM_THREADS", std::to_string(std::max(1, cores / ranks))}};
}

json run_processes(const RankRun& run, const json& settings) {
  const Channel channel = Channel::create(pack(settings));
  LaunchOptions options;
  if (run.runner == Runner::mpirun) {
    options = mpirun_options(run, channel);
  } else {
    options = {
        .ranks = run.ranks, .argv = rank_command(run, channel, 0), .env = thread_environment(run.ranks), .timeout_ms = run.timeout_ms};
  }
  std::vector<RankExit> exits;
  {
    const ProgressBar bar(channel.progress(), run.label);
    exits = launch(options);
  }
  std::vector<json> answers(run.ranks, json::object());
  for (int rank = 0; rank < run.ranks; ++rank) {
    const std::string text = channel.answer_of(rank);
    if (!text.empty()) answers[rank] = unpack(text);
  }
  rethrow_failures(run, answers, exits);
  if (!answers[0].contains("result")) throw Error("rank 0 ended without a result; its output is above");
  return answers[0]["result"];
}

json run_threads(const RankRun& run, const json& settings) {
  Progress progress;
  const ProgressBar bar(progress, run.label);
  json result;
  run_ranks(
      run.ranks,
      [&](World& world) {
        json mine = role_named(run.role)(world, settings, progress);
        if (world.rank() == 0) result = std::move(mine);
      },
      run.timeout_ms);
  return result;
}

World rank_world(int port, int timeout_ms) {
  if (port == 0) return World::from_env();
  constexpr int kAny = Channel::kMaxRanks;
  const auto number = [](const char* variable) { return env_int(variable, 0, kAny); };
  const std::optional<int> rank = number("OMPI_COMM_WORLD_RANK");
  const std::optional<int> size = number("OMPI_COMM_WORLD_SIZE");
  if (!rank || !size)
    throw Error("mpirun did not set OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE: it is not OpenMPI's; use --no-baseline");
  return World::connect({.rank = *rank,
                         .size = *size,
                         .local_rank = number("OMPI_COMM_WORLD_LOCAL_RANK").value_or(0),
                         .port = port,
                         .token = env("TOKENYARD_TOKEN").value_or(""),
                         .timeout_ms = timeout_ms});
}

// Which answer this process owes, also when no world comes about.
int own_rank(bool under_mpi) { return env_int(under_mpi ? "OMPI_COMM_WORLD_RANK" : "RANK", 0, Channel::kMaxRanks - 1).value_or(0); }

}  // namespace

std::string describe(Runner runner) {
  switch (runner) {
    case Runner::threads:
      return "threads";
    case Runner::processes:
      return "processes";
    case Runner::mpirun:
      return "processes started by mpirun";
  }
  TY_ASSERT(false);
}

json run_on_ranks(const RankRun& run, const json& settings) {
  TY_ASSERT(run.ranks >= 1 && run.ranks <= Channel::kMaxRanks);
  return run.runner == Runner::threads ? run_threads(run, settings) : run_processes(run, settings);
}

std::string find_mpirun() {
  std::istringstream folders(env("PATH").value_or(""));
  for (std::string folder; std::getline(folders, folder, ':');) {
    std::string path = folder + "/mpirun";
    if (::access(path.c_str(), X_OK) == 0) return path;
  }
  return {};
}

std::vector<json> gather(const World& world, const json& mine) {
  const std::string text = pack(mine);
  std::vector<json> all;
  for (const std::vector<std::byte>& bytes : world.all_gather(std::as_bytes(std::span(text)))) {
    all.push_back(unpack({reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
  }
  return all;
}

bool is_rank_process(int argc, char** argv) { return argc == 6 && std::strcmp(argv[1], kRankArgument) == 0; }

int rank_process(int, char** argv) {
  std::optional<Channel> channel;
  int rank = 0;
  json failure;
  try {
    channel.emplace(Channel::open(argv[3]));
    const int port = std::stoi(argv[4]);
    rank = own_rank(port != 0);
    const World world = rank_world(port, std::stoi(argv[5]));
    const json result = role_named(argv[2])(world, unpack(channel->request()), channel->progress());
    channel->answer(rank, pack({{"result", rank == 0 ? result : json()}}));
    return 0;
  } catch (const UsageError& wrong) {
    failure = {{"error", wrong.what()}, {"usage", true}};
  } catch (const std::exception& error) {
    failure = {{"error", error.what()}};
  }
  if (channel) channel->answer(rank, pack(failure));
  return failure.contains("usage") ? 2 : 1;
}

}  // namespace tokenyard::cli
