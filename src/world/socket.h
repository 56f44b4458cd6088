#pragma once
// TCP sockets of the store: non-blocking, closed on exec, never a SIGPIPE.

#include <sys/socket.h>

#include <span>
#include <string>

#include "core/deadline.h"
#include "core/expected.h"
#include "world/fd.h"

namespace tokenyard::world_internal {

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;
  std::string text;  // "127.0.0.1:29501", "[::1]:29501"
  bool is_loopback() const;
};

// A name or a number; port 0 lets the system choose when listening.
Expected<SocketAddress> resolve(const std::string& address, int port);

struct Listener {
  Fd fd;
  int port = 0;
};
Expected<Listener> listen_at(const SocketAddress& address);

// One attempt. `again` when nobody listens there yet.
struct Attempt {
  Fd fd;
  bool again = false;
  std::string error;
};
Attempt try_connect(const SocketAddress& address, Deadline deadline);

// The other end, for people.
std::string describe_peer(int socket);

// Sends everything, waiting for room until the deadline.
Expected<void> send_all(int socket, std::span<const std::byte> bytes, Deadline deadline);

// `error` is errno's value; the phase is rendezvous.
Failure system_failure(const std::string& what, int error);

}  // namespace tokenyard::world_internal
