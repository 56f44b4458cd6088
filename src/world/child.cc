#include "world/child.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#include "world/socket.h"

namespace tokenyard::world_internal {
namespace {

std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (const std::string& text : texts) result.push_back(const_cast<char*>(text.c_str()));  // exec's signature; it writes to none
  result.push_back(nullptr);
  return result;
}

// Everything the child needs, computed before it exists.
struct Plan {
  char* const* argv;
  char* const* environment;
  pid_t group;
  pid_t parent;
  int null;
  int out;
  int err;
  int report;  // a pipe: errno, when the program cannot be started
  sigset_t signals;
};

// Runs in the memory of the parent, whose thread waits: system calls only, nothing is allocated or locked.
[[noreturn]] void become(const Plan& plan) {
  constexpr int kCannotStart = 127;
  setpgid(0, plan.group);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != plan.parent) _exit(kCannotStart);  // it ended before the line above
  // Signals are blocked here. A handler of the parent must not run in the child once they no longer are.
  for (int signal = 1; signal < NSIG; ++signal) {
    struct sigaction action = {};
    if (sigaction(signal, nullptr, &action) != 0 || action.sa_handler == SIG_IGN || action.sa_handler == SIG_DFL) continue;
    action = {};
    sigaction(signal, &action, nullptr);
  }
  dup2(plan.null, STDIN_FILENO);
  if (plan.out >= 0) dup2(plan.out, STDOUT_FILENO);
  if (plan.err >= 0) dup2(plan.err, STDERR_FILENO);
  sigprocmask(SIG_SETMASK, &plan.signals, nullptr);
  execvpe(plan.argv[0], plan.argv, plan.environment);
  const int error = errno;
  static_cast<void>(!write(plan.report, &error, sizeof error));
  _exit(kCannotStart);
}

}  // namespace

Expected<Child> spawn(const ChildOptions& options) {
  int report[2];
  if (pipe2(report, O_CLOEXEC) != 0) return unexpected(system_failure("pipe", errno));
  const Fd report_read(report[0]);
  Fd report_write(report[1]);
  const Fd null(open("/dev/null", O_RDWR | O_CLOEXEC));
  if (!null) return unexpected(system_failure("/dev/null", errno));
  const auto argv = pointers(options.argv);
  const auto environment = pointers(options.environment);
  Plan plan{.argv = argv.data(),
            .environment = environment.data(),
            .group = options.group,
            .parent = getpid(),
            .null = null.get(),
            .out = options.out,
            .err = options.err,
            .report = report_write.get(),
            .signals = {}};
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &plan.signals);
  // vfork: a fork would copy the page tables of a large process, and not be safe beside threads; posix_spawn cannot ask
  // for the parent-death signal.
  const pid_t pid = vfork();
  if (pid == 0) become(plan);
  const int fork_error = errno;
  pthread_sigmask(SIG_SETMASK, &plan.signals, nullptr);
  if (pid < 0) return unexpected(system_failure("cannot start a process", fork_error));

  report_write.reset();
  int error = 0;
  ssize_t bytes = 0;
  do {
    bytes = read(report_read.get(), &error, sizeof error);  // ends at once: exec has closed the pipe, or its failure was written
  } while (bytes < 0 && errno == EINTR);
  Child child{.pid = pid, .pidfd = Fd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)))};
  if (bytes == 0 && child.pidfd) return child;
  Failure failure = bytes > 0 ? system_failure(fmt::format("cannot start \"{}\"", options.argv[0]), error)
                              : system_failure("pidfd_open (needs Linux 5.3)", errno);
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  return unexpected(std::move(failure));
}

}  // namespace tokenyard::world_internal
