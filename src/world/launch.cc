#include "tokenyard/launch.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/wait.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <map>
#include <optional>

#include "core/log.h"
#include "core/usage.h"
#include "world/child.h"
#include "world/line_pump.h"
#include "world/signal_relay.h"
#include "world/tcp_server.h"

extern char** environ;

namespace tokenyard {

using world_internal::Child;
using world_internal::Fd;
using world_internal::LinePump;
using world_internal::system_failure;
using world_internal::TcpServer;

namespace {

using Clock = Deadline::Clock;
constexpr const char* kAddress = "127.0.0.1";

void check(const LaunchOptions& options) {
  if (options.ranks < 1 || options.ranks > world_internal::kMaxWorldSize) {
    usage_error("launch of {} ranks: expected 1 to {}", options.ranks, world_internal::kMaxWorldSize);
  }
  if (options.argv.empty()) usage_error("launch without a program: argv is empty; give the program and its arguments");
  if (options.timeout_ms < 1) usage_error("timeout_ms = {}: expected at least 1 millisecond", options.timeout_ms);
  if (options.run_timeout_ms < 0) usage_error("run_timeout_ms = {}: expected 0 (never) or more", options.run_timeout_ms);
  if (options.grace_ms < 0) usage_error("grace_ms = {}: expected 0 or more", options.grace_ms);
}

// Loopback is open to every user of the machine; only our ranks may join.
std::string random_token() {
  std::array<unsigned char, 16> bytes{};
  if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    throw TransportError(system_failure("getrandom", errno));
  }
  std::string token;
  for (const unsigned char byte : bytes) token += fmt::format("{:02x}", byte);
  return token;
}

struct Pipe {
  Fd read;
  Fd write;
};
Pipe open_pipe() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) throw TransportError(system_failure("pipe", errno));
  Pipe pipe{Fd(ends[0]), Fd(ends[1])};
  fcntl(pipe.read.get(), F_SETFL, O_NONBLOCK);  // our end only: the rank's writes wait
  return pipe;
}

std::string describe(const RankExit& exit) {
  if (exit.signal != 0) return fmt::format("was killed by signal {} ({})", exit.signal, strsignal(exit.signal));
  return fmt::format("ended with exit code {}", exit.exit_code);
}

// The processes of one launch. None is reaped before the destructor: as long as the group's leader is there, even dead,
// its number names no other group.
class Ranks {
 public:
  Ranks(const LaunchOptions& options, TcpServer& server, const std::string& token) : options_(options), server_(server), token_(token) {}
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;
  ~Ranks() {
    relay_.set_group(0);
    kill_all();
    for (const Process& process : processes_) waitpid(process.child.pid, nullptr, 0);
  }

  void start();
  std::vector<RankExit> wait();

 private:
  struct Process {
    Child child;
    std::optional<RankExit> exit;
    std::vector<LinePump> output;  // stdout and stderr, when they are prefixed
  };

  std::vector<std::string> environment_of(int rank) const;
  void start_rank(int rank);
  void wait_for_events(int timeout_ms);
  void note_end(int rank);
  void kill_all() const;
  bool all_ended() const;

  const LaunchOptions& options_;
  TcpServer& server_;
  std::string token_;
  world_internal::SignalRelay relay_;
  std::vector<Process> processes_;
  std::optional<Clock::time_point> kill_at_;
};

std::vector<std::string> Ranks::environment_of(int rank) const {
  std::map<std::string, std::string> variables;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const std::size_t equals = text.find('=');
    if (equals != std::string_view::npos) variables[std::string(text.substr(0, equals))] = text.substr(equals + 1);
  }
  for (const auto& [name, value] : options_.env) variables[name] = value;
  variables["RANK"] = variables["LOCAL_RANK"] = std::to_string(rank);
  variables["WORLD_SIZE"] = std::to_string(options_.ranks);
  variables["MASTER_ADDR"] = kAddress;
  variables["TOKENYARD_PORT"] = std::to_string(server_.port());
  variables["TOKENYARD_STORE"] = "1";
  variables["TOKENYARD_TOKEN"] = token_;
  variables["TOKENYARD_TIMEOUT_MS"] = std::to_string(options_.timeout_ms);
  std::vector<std::string> environment;
  for (const auto& [name, value] : variables) environment.push_back(fmt::format("{}={}", name, value));
  return environment;
}

void Ranks::start_rank(int rank) {
  world_internal::ChildOptions child{.argv = options_.argv, .environment = environment_of(rank)};
  if (!processes_.empty()) child.group = processes_.front().child.pid;
  std::vector<LinePump> output;
  std::array<Fd, 2> ends;  // ours go when the rank has its own
  if (options_.prefix_output) {
    const std::string prefix = fmt::format("[rank {}] ", rank);
    for (const int to : {STDOUT_FILENO, STDERR_FILENO}) {
      Pipe pipe = open_pipe();
      output.emplace_back(std::move(pipe.read), to, prefix);
      ends[to == STDERR_FILENO] = std::move(pipe.write);
    }
    child.out = ends[0].get();
    child.err = ends[1].get();
  }
  processes_.push_back({value_or_throw(world_internal::spawn(child)), std::nullopt, std::move(output)});
  relay_.set_group(processes_.front().child.pid);
}

void Ranks::start() {
  processes_.reserve(options_.ranks);
  for (int rank = 0; rank < options_.ranks; ++rank) {
    start_rank(rank);
    if (options_.on_start) options_.on_start(rank, processes_.back().child.pid);
  }
}

void Ranks::kill_all() const {
  if (!processes_.empty()) kill(-processes_.front().child.pid, SIGKILL);
  for (const Process& process : processes_) kill(process.child.pid, SIGKILL);  // also one that has left the group
}

bool Ranks::all_ended() const {
  for (const Process& process : processes_) {
    if (!process.exit) return false;
  }
  return true;
}

void Ranks::note_end(int rank) {
  Process& process = processes_[rank];
  siginfo_t info = {};
  const auto pidfd = static_cast<id_t>(process.child.pidfd.get());
  if (waitid(P_PIDFD, pidfd, &info, WEXITED | WNOWAIT) != 0) {
    throw TransportError(system_failure(
        fmt::format("cannot learn how rank {} ended (does this process ignore SIGCHLD, or wait for any child?)", rank), errno));
  }
  RankExit exit{.rank = rank, .pid = process.child.pid};
  if (info.si_code == CLD_EXITED) {
    exit.exit_code = info.si_status;
  } else {
    exit.signal = info.si_status;
    exit.exit_code = 128 + info.si_status;
  }
  server_.lose(rank, describe(exit));
  if (exit.exit_code != 0) {
    log_info("launch: rank {} (pid {}) {}", rank, exit.pid, describe(exit));
    if (!kill_at_) kill_at_ = Clock::now() + std::chrono::milliseconds(options_.grace_ms);
  }
  process.exit = exit;
}

void Ranks::wait_for_events(int timeout_ms) {
  std::vector<pollfd> events{{.fd = relay_.fd(), .events = POLLIN, .revents = 0}};
  for (const Process& process : processes_) {
    events.push_back({.fd = process.exit ? -1 : process.child.pidfd.get(), .events = POLLIN, .revents = 0});
    for (const LinePump& pump : process.output) events.push_back({.fd = pump.fd(), .events = POLLIN, .revents = 0});
  }
  poll(events.data(), events.size(), timeout_ms);
  if (events[0].revents != 0) {
    eventfd_t relayed = 0;
    eventfd_read(relay_.fd(), &relayed);
    if (!kill_at_) kill_at_ = Clock::now() + std::chrono::milliseconds(options_.grace_ms);
  }
  std::size_t next = 1;
  for (int rank = 0; rank < static_cast<int>(processes_.size()); ++rank) {
    if (events[next++].revents != 0) note_end(rank);
    for (LinePump& pump : processes_[rank].output) {
      if (events[next++].revents != 0) pump.pump();
    }
  }
}

std::vector<RankExit> Ranks::wait() {
  std::optional<Clock::time_point> run_until;
  if (options_.run_timeout_ms > 0) run_until = Clock::now() + std::chrono::milliseconds(options_.run_timeout_ms);
  while (!all_ended()) {
    std::optional<Clock::time_point> next = kill_at_;
    if (run_until && (!next || *run_until < *next)) next = run_until;
    int timeout_ms = -1;
    if (next) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(*next - Clock::now()).count();
      timeout_ms = static_cast<int>(std::max<std::int64_t>(left, 0));
    }
    wait_for_events(timeout_ms);
    const auto now = Clock::now();
    if (run_until && now >= *run_until) {
      log_warn("launch: killing all ranks, which have run for {} ms", options_.run_timeout_ms);
      kill_at_ = now;
      run_until.reset();
    }
    if (kill_at_ && now >= *kill_at_) {
      kill_all();
      kill_at_ = now + std::chrono::seconds(1);  // until the kernel has done it
    }
  }
  kill_all();  // what the ranks themselves have started and left
  std::vector<RankExit> exits;
  for (Process& process : processes_) {
    for (LinePump& pump : process.output) pump.finish();
    exits.push_back(*process.exit);
  }
  return exits;
}

}  // namespace

std::vector<RankExit> launch(const LaunchOptions& options) {
  check(options);
  const std::string token = random_token();
  const auto address = value_or_throw(world_internal::resolve(kAddress, 0));
  const auto server = value_or_throw(TcpServer::start(address, options.ranks, token));
  Ranks ranks(options, *server, token);
  ranks.start();
  return ranks.wait();
}

}  // namespace tokenyard
