#pragma once
// Who a rank is: its host and its process, and whether that process still lives.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/expected.h"
#include "tokenyard/world.h"
#include "world/fd.h"

namespace tokenyard::world_internal {

struct Identity {
  std::string host;                 // for people
  std::string boot_id;              // of the running kernel: equal means the same machine
  std::uint64_t net_namespace = 0;  // abstract sockets, over which shared memory is passed, are per network namespace
  std::uint64_t pid_namespace = 0;
  std::uint32_t user = 0;
  std::int32_t pid = 0;
  std::uint64_t start_time = 0;  // clock ticks after boot: with it, a pid names one process for ever
  std::int32_t local_rank = 0;

  static Identity of_this_process(int local_rank);
  std::vector<std::byte> encode() const;
  static Expected<Identity> decode(std::span<const std::byte> bytes);
  // "host node7, pid 1234"
  std::string describe() const;
};

// Whether two ranks (of different processes or one) can pass memory to each other.
LinkKind link_between(const Identity& a, const Identity& b);

// A process of this host, watched without blocking.
class ProcessWatch {
 public:
  // Watches nothing: never ended.
  ProcessWatch() = default;
  // Nothing is watched when the peer's pid means nothing here (another host or pid namespace) or the kernel has no pidfd.
  ProcessWatch(const Identity& self, const Identity& peer);
  bool ended() const;

 private:
  Fd pidfd_;
  bool ended_ = false;  // was gone already
};

}  // namespace tokenyard::world_internal
