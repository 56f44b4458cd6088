#pragma once
// One file descriptor from every rank to every other rank of a host, over abstract Unix sockets: nothing appears in the
// file system, and nothing is left when a process is killed.

#include <string>
#include <vector>

#include "core/deadline.h"
#include "core/expected.h"
#include "tokenyard/world.h"
#include "world/fd.h"

namespace tokenyard {

class FdExchange {
 public:
  // Where a rank listens. The address is visible to every user of the host; the secret is told to the other ranks only.
  struct Endpoint {
    std::string address;
    std::string secret;
  };

  static Expected<FdExchange> listen();
  const Endpoint& endpoint() const { return endpoint_; }

  // Collective. endpoints[r] is rank r's; returns every rank's descriptor, this rank's own place empty.
  Expected<std::vector<world_internal::Fd>> swap(const World& world, const std::vector<Endpoint>& endpoints, int fd,
                                                 Deadline deadline) const;

 private:
  world_internal::Fd listener_;
  Endpoint endpoint_;
};

}  // namespace tokenyard
