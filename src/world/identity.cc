#include "world/identity.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <fstream>
#include <iterator>
#include <sstream>

#include "world/bytes.h"

namespace tokenyard::world_internal {
namespace {

std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The inode of a namespace names it on one kernel; 0 when /proc does not tell.
std::uint64_t namespace_id(const char* path) {
  struct stat status = {};
  return stat(path, &status) == 0 ? status.st_ino : 0;
}

// Field 22 of /proc/<pid>/stat (proc(5)); 0 when there is no such process. The second field, the program's name, may
// hold spaces and parentheses, so fields are counted from its last parenthesis.
std::uint64_t start_time_of(int pid) {
  const std::string line = first_line(fmt::format("/proc/{}/stat", pid).c_str());
  const std::size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return 0;
  std::istringstream rest(line.substr(name_end + 1));
  constexpr int kFieldsAfterName = 22 - 2;
  std::string field;
  for (int i = 0; i < kFieldsAfterName; ++i) rest >> field;
  return std::strtoull(field.c_str(), nullptr, 10);
}

}  // namespace

Identity Identity::of_this_process(int local_rank) {
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  return {
      .host = host.data(),
      .boot_id = first_line("/proc/sys/kernel/random/boot_id"),
      .net_namespace = namespace_id("/proc/self/ns/net"),
      .pid_namespace = namespace_id("/proc/self/ns/pid"),
      .user = geteuid(),
      .pid = getpid(),
      .start_time = start_time_of(getpid()),
      .local_rank = local_rank,
  };
}

std::vector<std::byte> Identity::encode() const {
  ByteWriter out;
  out.put_text(host);
  out.put_text(boot_id);
  out.put(net_namespace);
  out.put(pid_namespace);
  out.put(user);
  out.put(pid);
  out.put(start_time);
  out.put(local_rank);
  return out.take();
}

Expected<Identity> Identity::decode(std::span<const std::byte> bytes) {
  ByteReader in(bytes);
  Identity identity;
  identity.host = in.get_text();
  identity.boot_id = in.get_text();
  identity.net_namespace = in.get<std::uint64_t>();
  identity.pid_namespace = in.get<std::uint64_t>();
  identity.user = in.get<std::uint32_t>();
  identity.pid = in.get<std::int32_t>();
  identity.start_time = in.get<std::uint64_t>();
  identity.local_rank = in.get<std::int32_t>();
  if (!in.finished()) {
    return unexpected({.kind = FailureKind::mismatch,
                       .phase = Phase::rendezvous,
                       .detail = fmt::format("an identity of {} bytes: do all ranks run the same version?", bytes.size())});
  }
  return identity;
}

std::string Identity::describe() const { return fmt::format("host {}, pid {}", host, pid); }

LinkKind link_between(const Identity& a, const Identity& b) {
  const bool same_machine = !a.boot_id.empty() && a.boot_id == b.boot_id && a.net_namespace == b.net_namespace;
  return same_machine && a.user == b.user ? LinkKind::peer : LinkKind::network;
}

ProcessWatch::ProcessWatch(const Identity& self, const Identity& peer) {
  const bool same_pids = self.boot_id == peer.boot_id && self.pid_namespace == peer.pid_namespace && self.pid_namespace != 0;
  if (!same_pids || peer.start_time == 0) return;
  pidfd_ = Fd(static_cast<int>(syscall(SYS_pidfd_open, peer.pid, 0)));
  // Asked after the descriptor exists: if the pid was reused before, the start times differ, and it cannot be reused after.
  if (pidfd_)
    ended_ = start_time_of(peer.pid) != peer.start_time;
  else
    ended_ = errno == ESRCH;
}

bool ProcessWatch::ended() const {
  if (ended_ || !pidfd_) return ended_;
  pollfd poll_one{.fd = pidfd_.get(), .events = POLLIN, .revents = 0};
  return poll(&poll_one, 1, 0) == 1;
}

}  // namespace tokenyard::world_internal
