#pragma once
// The local launcher: ranks as processes of this host, with the store in the launcher.

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace tokenyard {

struct LaunchOptions {
  int ranks = 1;
  std::vector<std::string> argv{};                         // program and arguments, the same for every rank
  std::vector<std::pair<std::string, std::string>> env{};  // added to this process's environment
  bool prefix_output = true;                               // "[rank 2] " before every line of a rank
  int timeout_ms = 100'000;                                // deadline of the ranks' waits (TOKENYARD_TIMEOUT_MS)
  int run_timeout_ms = 0;                                  // kill all ranks after this time; 0: never
  int grace_ms = 5'000;                                    // after a rank died, time for the others to report before they are killed
  std::function<void(int rank, int pid)> on_start{};       // called once per rank, e.g. by tests that kill one
};

struct RankExit {
  int rank = 0;
  int pid = 0;
  int exit_code = 0;  // 128 + signal when a signal ended it
  int signal = 0;
};

// Starts the ranks with exec, waits for all of them, and leaves no process behind, also when it throws. Each rank gets RANK, WORLD_SIZE,
// LOCAL_RANK, MASTER_ADDR, TOKENYARD_PORT, TOKENYARD_STORE=1 and a random TOKENYARD_TOKEN. A death is noticed through a pidfd and
// told to the other ranks. Meanwhile SIGINT and SIGTERM go to the ranks, which are killed if they outlive them by grace_ms; a
// launcher that is killed takes its ranks with it. The calling thread must be able to wait for its children (SIGCHLD not ignored).
// UsageError for ranks < 1 or an empty argv; TransportError when a program cannot be started.
std::vector<RankExit> launch(const LaunchOptions& options);

}  // namespace tokenyard
