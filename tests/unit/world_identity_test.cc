#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <vector>

#include "world/identity.h"

namespace tokenyard::world_internal {
namespace {

bool same(const Identity& a, const Identity& b) { return a.encode() == b.encode(); }

TEST(WorldIdentity, ItSurvivesTheWire) {
  const Identity mine = Identity::of_this_process(5);
  EXPECT_EQ(mine.pid, getpid());
  EXPECT_EQ(mine.local_rank, 5);
  EXPECT_FALSE(mine.host.empty());
  EXPECT_GT(mine.start_time, 0U);
  const std::vector<std::byte> bytes = mine.encode();
  const auto read = Identity::decode(bytes);
  ASSERT_TRUE(read.has_value());
  EXPECT_TRUE(same(*read, mine));
  EXPECT_EQ(read->host, mine.host);
  EXPECT_EQ(read->start_time, mine.start_time);
  for (std::size_t cut = 0; cut < bytes.size(); ++cut) EXPECT_FALSE(Identity::decode(std::span(bytes).first(cut)).has_value()) << cut;
}

TEST(WorldIdentity, MemoryIsSharedWithinOneMachineNetworkNamespaceAndUser) {
  const Identity mine = Identity::of_this_process(0);
  Identity other = mine;
  other.pid = mine.pid + 1;
  EXPECT_EQ(link_between(mine, other), LinkKind::peer);
  other.pid_namespace = mine.pid_namespace + 1;
  EXPECT_EQ(link_between(mine, other), LinkKind::peer) << "memory is passed over sockets, whatever the pid is here";
  for (const auto change :
       {+[](Identity& one) { one.boot_id += "x"; }, +[](Identity& one) { ++one.net_namespace; }, +[](Identity& one) { ++one.user; }}) {
    Identity far = mine;
    change(far);
    EXPECT_EQ(link_between(mine, far), LinkKind::network);
  }
  Identity unknown = mine;
  unknown.boot_id.clear();
  EXPECT_EQ(link_between(unknown, unknown), LinkKind::network) << "where /proc does not tell, nothing is assumed";
}

// A child of this process, waiting to be killed.
class Child {
 public:
  Child() : pid_(fork()) {
    if (pid_ == 0) {
      pause();
      _exit(0);
    }
  }
  ~Child() { end(); }
  int pid() const { return pid_; }
  void end() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }

 private:
  int pid_;
};

// Its identity, as it would have told it itself.
Identity identity_of(int pid, std::uint64_t start_time) {
  Identity identity = Identity::of_this_process(0);
  identity.pid = pid;
  identity.start_time = start_time;
  return identity;
}

TEST(WorldIdentity, AWatchSeesTheEnd) {
  const Identity mine = Identity::of_this_process(0);
  const ProcessWatch self(mine, mine);
  EXPECT_FALSE(self.ended());
  EXPECT_FALSE(ProcessWatch().ended());
  int pipes[2];
  ASSERT_EQ(pipe(pipes), 0);
  const int pid = fork();
  if (pid == 0) {
    const auto bytes = Identity::of_this_process(0).encode();
    if (write(pipes[1], bytes.data(), bytes.size()) < 0) _exit(1);
    pause();
  }
  std::vector<std::byte> bytes(4096);
  const ssize_t count = read(pipes[0], bytes.data(), bytes.size());
  ASSERT_GT(count, 0);
  const auto child = Identity::decode(std::span(bytes).first(static_cast<std::size_t>(count)));
  ASSERT_TRUE(child.has_value());
  EXPECT_EQ(child->pid, pid);
  const ProcessWatch watch(mine, *child);
  EXPECT_FALSE(watch.ended());
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  EXPECT_TRUE(watch.ended());
  EXPECT_TRUE(ProcessWatch(mine, *child).ended()) << "also when it was gone before";
  close(pipes[0]);
  close(pipes[1]);
}

TEST(WorldIdentity, AnotherProcessWithTheSamePidIsNotTheOneMeant) {
  const Identity mine = Identity::of_this_process(0);
  Child child;
  EXPECT_TRUE(ProcessWatch(mine, identity_of(child.pid(), mine.start_time + 1'000'000)).ended());
}

TEST(WorldIdentity, AForeignPidIsNotWatched) {
  const Identity mine = Identity::of_this_process(0);
  Child child;
  Identity foreign = identity_of(child.pid(), 1);
  foreign.pid_namespace = mine.pid_namespace + 1;
  const ProcessWatch watch(mine, foreign);
  child.end();
  EXPECT_FALSE(watch.ended()) << "the store tells";
}

}  // namespace
}  // namespace tokenyard::world_internal
