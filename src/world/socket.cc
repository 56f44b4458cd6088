#include "world/socket.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

namespace tokenyard::world_internal {
namespace {

const sockaddr* as_sockaddr(const sockaddr_storage& storage) { return reinterpret_cast<const sockaddr*>(&storage); }
sockaddr* as_sockaddr(sockaddr_storage& storage) { return reinterpret_cast<sockaddr*>(&storage); }

std::string to_text(const sockaddr_storage& storage, socklen_t length) {
  std::array<char, NI_MAXHOST> host{};
  std::array<char, NI_MAXSERV> service{};
  constexpr int kFlags = NI_NUMERICHOST | NI_NUMERICSERV;
  const sockaddr* address = as_sockaddr(storage);
  if (getnameinfo(address, length, host.data(), host.size(), service.data(), service.size(), kFlags) != 0) return "unknown";
  if (storage.ss_family == AF_INET6) return fmt::format("[{}]:{}", host.data(), service.data());
  return fmt::format("{}:{}", host.data(), service.data());
}

void set_option(int socket, int level, int option) {
  const int on = 1;
  setsockopt(socket, level, option, &on, sizeof on);
}

std::string own_address(int socket) {
  SocketAddress own;
  own.length = sizeof own.storage;
  return getsockname(socket, as_sockaddr(own.storage), &own.length) == 0 ? to_text(own.storage, own.length) : "";
}

}  // namespace

bool SocketAddress::is_loopback() const {
  if (storage.ss_family == AF_INET) {
    constexpr std::uint32_t kLoopbackNetwork = 127;
    return ntohl(reinterpret_cast<const sockaddr_in&>(storage).sin_addr.s_addr) >> 24 == kLoopbackNetwork;
  }
  return storage.ss_family == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6&>(storage).sin6_addr);
}

Failure system_failure(const std::string& what, int error) {
  return {.kind = FailureKind::system, .phase = Phase::rendezvous, .detail = fmt::format("{}: {}", what, std::strerror(error))};
}

Expected<SocketAddress> resolve(const std::string& address, int port) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (error != 0) {
    return unexpected({.kind = FailureKind::system,
                       .phase = Phase::rendezvous,
                       .detail = fmt::format("address \"{}\" of the store (MASTER_ADDR): {}", address, gai_strerror(error))});
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  SocketAddress result;
  std::memcpy(&result.storage, found->ai_addr, found->ai_addrlen);
  result.length = found->ai_addrlen;
  result.text = to_text(result.storage, result.length);
  return result;
}

Expected<Listener> listen_at(const SocketAddress& address) {
  Listener listener;
  listener.fd = Fd(socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener.fd) return unexpected(system_failure("socket", errno));
  // A port whose last connections are still in TIME_WAIT is free.
  set_option(listener.fd.get(), SOL_SOCKET, SO_REUSEADDR);
  SocketAddress bound;
  bound.length = sizeof bound.storage;
  if (bind(listener.fd.get(), as_sockaddr(address.storage), address.length) != 0 || listen(listener.fd.get(), SOMAXCONN) != 0 ||
      getsockname(listener.fd.get(), as_sockaddr(bound.storage), &bound.length) != 0) {
    const int error = errno;
    return unexpected(system_failure(fmt::format("the store cannot listen at {} (TOKENYARD_PORT, MASTER_ADDR)", address.text), error));
  }
  listener.port = ntohs(bound.storage.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(bound.storage).sin6_port
                                                            : reinterpret_cast<sockaddr_in&>(bound.storage).sin_port);
  return listener;
}

Attempt try_connect(const SocketAddress& address, Deadline deadline) {
  Attempt attempt{.fd = Fd(socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)), .again = false, .error = {}};
  int error = attempt.fd ? 0 : errno;
  if (error == 0 && connect(attempt.fd.get(), as_sockaddr(address.storage), address.length) != 0) error = errno;
  if (error == EINPROGRESS) {
    pollfd writable{.fd = attempt.fd.get(), .events = POLLOUT, .revents = 0};
    error = ETIMEDOUT;
    socklen_t length = sizeof error;
    if (poll(&writable, 1, deadline.remaining_ms()) == 1) getsockopt(attempt.fd.get(), SOL_SOCKET, SO_ERROR, &error, &length);
  }
  // A port of the range for outgoing connections, where nobody listens yet, may be given to this very connection: then it
  // reaches itself.
  if (error == 0 && own_address(attempt.fd.get()) == describe_peer(attempt.fd.get())) error = ECONNREFUSED;
  if (error == 0) {
    set_option(attempt.fd.get(), IPPROTO_TCP, TCP_NODELAY);
    return attempt;
  }
  // Before the host, or the store on it, is up.
  attempt.again = error == ECONNREFUSED || error == ECONNRESET || error == EHOSTUNREACH || error == ENETUNREACH || error == ETIMEDOUT ||
                  error == EINTR || error == EAGAIN;
  attempt.error = std::strerror(error);
  attempt.fd.reset();
  return attempt;
}

std::string describe_peer(int socket) {
  SocketAddress peer;
  peer.length = sizeof peer.storage;
  if (getpeername(socket, as_sockaddr(peer.storage), &peer.length) != 0) return "unknown";
  return to_text(peer.storage, peer.length);
}

Expected<void> send_all(int socket, std::span<const std::byte> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    const ssize_t sent = send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0) {
      bytes = bytes.subspan(static_cast<std::size_t>(sent));
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK) return unexpected(system_failure("send", errno));
    if (deadline.expired()) return unexpected(system_failure("send", ETIMEDOUT));
    pollfd writable{.fd = socket, .events = POLLOUT, .revents = 0};
    poll(&writable, 1, deadline.remaining_ms());
  }
  return {};
}

}  // namespace tokenyard::world_internal
