#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "multirank/exchange_processes.h"
#include "multirank/world_failures.h"
#include "tokenyard/error.h"
#include "tokenyard/launch.h"

namespace tokenyard::world_test {
namespace {

LaunchOptions shell(const std::string& script, int ranks) {
  LaunchOptions options;
  options.ranks = ranks;
  options.argv = {"sh", "-c", script};
  return options;
}

// What a launch writes to stdout, in lines, sorted: ranks run at once.
std::vector<std::string> output_of(const LaunchOptions& options) {
  testing::internal::CaptureStdout();
  launch(options);
  std::istringstream text(testing::internal::GetCapturedStdout());
  std::vector<std::string> lines;
  for (std::string line; std::getline(text, line);) lines.push_back(line);
  std::sort(lines.begin(), lines.end());
  return lines;
}

bool exists(int pid) { return kill(pid, 0) == 0; }

std::size_t open_descriptors() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

TEST(Launch, BadOptionsAreUsageErrors) {
  EXPECT_THROW(launch(shell("true", 0)), UsageError);
  EXPECT_THROW(launch(shell("true", -1)), UsageError);
  EXPECT_THROW(launch({.ranks = 2, .argv = {}}), UsageError);
  LaunchOptions options = shell("true", 1);
  options.timeout_ms = 0;
  EXPECT_THROW(launch(options), UsageError);
  options = shell("true", 1);
  options.grace_ms = -1;
  EXPECT_THROW(launch(options), UsageError);
  options = shell("true", 1);
  options.run_timeout_ms = -1;
  EXPECT_THROW(launch(options), UsageError);
}

TEST(Launch, RanksGetTheirEnvironment) {
  LaunchOptions options = shell(
      "echo $RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $TOKENYARD_STORE $TOKENYARD_TIMEOUT_MS $EXTRA; "
      "test \"$TOKENYARD_PORT\" -gt 0 && test ${#TOKENYARD_TOKEN} -ge 32 && test -n \"$PATH\" || echo missing",
      3);
  options.env = {{"EXTRA", "a b"}, {"RANK", "99"}};
  options.timeout_ms = 777;
  EXPECT_EQ(output_of(options), (std::vector<std::string>{"[rank 0] 0 3 0 127.0.0.1 1 777 a b", "[rank 1] 1 3 1 127.0.0.1 1 777 a b",
                                                          "[rank 2] 2 3 2 127.0.0.1 1 777 a b"}));
}

TEST(Launch, ExitCodesAndSignalsAreReported) {
  LaunchOptions options = shell("test $RANK = 3 && kill -9 $$; exit $RANK", 4);
  std::vector<int> pids;
  options.on_start = [&](int rank, int pid) {
    EXPECT_EQ(rank, static_cast<int>(pids.size()));
    pids.push_back(pid);
  };
  const std::vector<RankExit> exits = launch(options);
  ASSERT_EQ(exits.size(), 4U);
  for (int rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(exits[rank].rank, rank);
    EXPECT_EQ(exits[rank].pid, pids[rank]);
    EXPECT_EQ(exits[rank].signal, rank == 3 ? SIGKILL : 0);
    EXPECT_EQ(exits[rank].exit_code, rank == 3 ? 128 + SIGKILL : rank);
  }
}

TEST(Launch, StdinIsEmpty) { EXPECT_EQ(launch(shell("cat; test -z \"$(cat)\"", 1))[0].exit_code, 0); }

TEST(Launch, EveryLineHasItsPrefix) {
  const std::vector<std::string> lines = output_of(shell("printf 'one\\n\\nthree'", 2));
  EXPECT_EQ(lines,
            (std::vector<std::string>{"[rank 0] ", "[rank 0] one", "[rank 0] three", "[rank 1] ", "[rank 1] one", "[rank 1] three"}));
}

TEST(Launch, StderrIsPrefixedToo) {
  testing::internal::CaptureStderr();
  launch(shell("echo wrong >&2", 1));
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "[rank 0] wrong\n");
}

TEST(Launch, WithoutPrefixTheOutputIsTheRanksOwn) {
  LaunchOptions options = shell("echo hello", 1);
  options.prefix_output = false;
  EXPECT_EQ(output_of(options), std::vector<std::string>{"hello"});
}

TEST(Launch, MuchOutputIsComplete) {
  const std::vector<std::string> lines = output_of(shell("seq 1 30000", 2));
  EXPECT_EQ(lines.size(), 60'000U);
  EXPECT_EQ(std::set<std::string>(lines.begin(), lines.end()).size(), 60'000U);
}

TEST(Launch, AnEndlessLineIsBroken) {
  const std::vector<std::string> lines = output_of(shell("head -c 200000 /dev/zero | tr '\\0' x", 1));
  std::size_t letters = 0;
  for (const std::string& line : lines) letters += static_cast<std::size_t>(std::count(line.begin(), line.end(), 'x'));
  EXPECT_EQ(letters, 200'000U);
  EXPECT_EQ(lines.size(), 4U);
}

TEST(Launch, AProgramThatIsNotThereIsNamed) {
  LaunchOptions options = shell("true", 2);
  options.argv = {"no-such-program"};
  const Failure failure = failure_of([&] { launch(options); });
  EXPECT_EQ(failure.kind, FailureKind::system);
  EXPECT_NE(failure.detail.find("\"no-such-program\": No such file"), std::string::npos) << failure.detail;
  options.argv = {"/etc/passwd"};
  EXPECT_NE(failure_of([&] { launch(options); }).detail.find("Permission denied"), std::string::npos);
}

TEST(Launch, NothingIsLeftWhenItThrows) {
  LaunchOptions options = shell("sleep 1000", 3);
  std::vector<int> pids;
  options.on_start = [&](int rank, int pid) {
    pids.push_back(pid);
    if (rank == 1) throw std::domain_error("from on_start");
  };
  EXPECT_THROW(launch(options), std::domain_error);
  ASSERT_EQ(pids.size(), 2U);
  for (const int pid : pids) EXPECT_FALSE(exists(pid));
}

TEST(Launch, AfterADeathTheOthersHaveTheGraceTime) {
  LaunchOptions options = shell("test $RANK = 0 && exit 3; test $RANK = 1 && sleep 0.2 && exit 4; sleep 1000", 3);
  options.grace_ms = 3000;
  const Stopwatch watch;
  const std::vector<RankExit> exits = launch(options);
  EXPECT_GE(watch.ms(), 3000);
  EXPECT_LT(watch.ms(), 20'000);
  EXPECT_EQ(exits[0].exit_code, 3);
  EXPECT_EQ(exits[1].exit_code, 4);
  EXPECT_EQ(exits[2].signal, SIGKILL);
}

TEST(Launch, ARunEndsAtItsTimeout) {
  LaunchOptions options = shell("sleep 1000", 2);
  options.run_timeout_ms = 300;
  const Stopwatch watch;
  for (const RankExit& exit : launch(options)) EXPECT_EQ(exit.signal, SIGKILL);
  EXPECT_GE(watch.ms(), 300);
  EXPECT_LT(watch.ms(), 20'000);
}

// What a rank starts and leaves goes with it.
TEST(Launch, GrandchildrenEndWithTheRun) {
  const std::vector<std::string> lines = output_of(shell("sleep 1000 & echo $!", 2));
  ASSERT_EQ(lines.size(), 2U);
  for (const std::string& line : lines) {
    const int pid = std::stoi(line.substr(line.find(']') + 1));
    EXPECT_TRUE(comes_true(5000, [&] { return !exists(pid); })) << line;
  }
}

TEST(Launch, RanksInheritNoDescriptorsOfTheLauncher) {
  const std::vector<std::string> lines = output_of(shell("ls -l /proc/self/fd | grep -cE 'socket|event|pidfd|memfd'", 2));
  EXPECT_EQ(lines, (std::vector<std::string>{"[rank 0] 0", "[rank 1] 0"}));
}

TEST(Launch, ManyRunsLeaveNothingBehind) {
  launch(shell("true", 2));
  const std::size_t before = open_descriptors();
  for (int i = 0; i < 20; ++i) launch(shell("true", 3));
  EXPECT_EQ(open_descriptors(), before);
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "no child is left, not even a dead one";
  EXPECT_EQ(errno, ECHILD);
}

TEST(Launch, RunsMayOverlap) {
  std::vector<std::jthread> threads;
  std::atomic<int> good{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (const RankExit& exit : launch(shell("exit " + std::to_string(i), 2))) good += exit.exit_code == i;
    });
  }
  threads.clear();
  EXPECT_EQ(good, 8);
}

// The launcher is told to end: its ranks are, and it returns.
TEST(Launch, SignalsReachTheRanks) {
  for (const int signal : {SIGINT, SIGTERM}) {
    struct sigaction before = {};  // the default: a shell that runs the tests in the background has them ignored
    sigaction(signal, &before, nullptr);
    LaunchOptions options = {.ranks = 2, .argv = {"sleep", "1000"}};  // no shell: one that starts a program may lose a SIGINT
    options.on_start = [&](int rank, int) {
      if (rank == 1) kill(getpid(), signal);
    };
    for (const RankExit& exit : launch(options)) EXPECT_EQ(exit.signal, signal);
    struct sigaction after = {};
    sigaction(signal, nullptr, &after);
    EXPECT_EQ(after.sa_handler, before.sa_handler);
  }
}

bool ignores(int pid, int signal) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("SigIgn:")) return (std::stoull(line.substr(8), nullptr, 16) >> (signal - 1) & 1) != 0;
  }
  return false;
}

TEST(Launch, RanksThatIgnoreTheSignalAreKilledAfterTheGraceTime) {
  LaunchOptions options = shell("trap '' TERM; sleep 1000", 1);
  options.grace_ms = 500;
  std::jthread sender;
  options.on_start = [&](int, int pid) {
    sender = std::jthread([pid] {
      EXPECT_TRUE(comes_true(30'000, [pid] { return ignores(pid, SIGTERM); }));
      kill(getpid(), SIGTERM);
    });
  };
  const Stopwatch watch;
  EXPECT_EQ(launch(options)[0].signal, SIGKILL);
  EXPECT_LT(watch.ms(), 20'000);
}

// Runs as a rank, and is a launcher itself; the test kills it.
const exchange_test::RegisterBody kNested("launch.nested", [](World&, const std::string& path) {
  LaunchOptions options = shell("sleep 1000; true", 2);
  std::ofstream file(path);
  options.on_start = [&](int, int pid) { file << pid << std::endl; };
  launch(options);
});

TEST(Launch, RanksEndWithAKilledLauncher) {
  const std::string path = testing::TempDir() + "tokenyard_launch_" + std::to_string(getpid());
  std::atomic<int> launcher{0};
  std::vector<int> pids;
  std::jthread killer([&] {
    EXPECT_TRUE(comes_true(30'000, [&] {
      std::ifstream file(path);
      pids.clear();
      for (int pid = 0; file >> pid;) pids.push_back(pid);
      return launcher != 0 && pids.size() == 2;
    }));
    for (const int pid : pids) EXPECT_TRUE(exists(pid));
    kill(launcher, SIGKILL);
  });
  const auto exits = exchange_test::run_processes(
      {.body = "launch.nested", .argument = path, .ranks = 1, .on_start = [&](int, int pid) { launcher = pid; }});
  killer.join();
  EXPECT_EQ(exits[0].signal, SIGKILL);
  for (const int pid : pids) EXPECT_TRUE(comes_true(5000, [&] { return !exists(pid); }));
  std::filesystem::remove(path);
}

// A rank that has ended is told to the others by the launcher, even if its connection lives on in a child of it.
const exchange_test::RegisterBody kForked("launch.forked", [](World& world, const std::string&) {
  world.barrier();
  if (world.rank() == 1) {
    if (fork() == 0) {  // holds a copy of the connection
      sleep(1000);
      _exit(0);
    }
    raise(SIGKILL);
  }
  const Stopwatch watch;
  const Failure failure = failure_of([&] { world.barrier(); });
  EXPECT_LT(watch.ms(), 2000);
  EXPECT_EQ(failure.peer, 1);
  EXPECT_NE(failure.detail.find("was killed by signal 9 (Killed)"), std::string::npos) << failure.detail;
});

TEST(Launch, ADeathIsToldEvenIfTheConnectionLives) {
  const auto exits = exchange_test::run_processes({.body = "launch.forked", .ranks = 3});
  EXPECT_EQ(exits[0].exit_code, 0);
  EXPECT_EQ(exits[1].signal, SIGKILL);
  EXPECT_EQ(exits[2].exit_code, 0);
}

}  // namespace
}  // namespace tokenyard::world_test
