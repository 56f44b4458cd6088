#include "memory/fd_exchange.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>
#include <thread>

#include "core/log.h"
#include "memory/mapping.h"

namespace tokenyard {

using world_internal::Fd;

namespace {

constexpr std::size_t kSecretBytes = 16;
constexpr std::chrono::milliseconds kTick{10};

struct Message {
  std::array<char, kSecretBytes> secret;  // the receiver's
  std::int32_t rank;                      // the sender
};
static_assert(std::is_trivially_copyable_v<Message>);  // never leaves the host, so its layout is the same on both sides

Expected<std::string> random_bytes(std::size_t count) {
  std::string bytes(count, '\0');
  if (getrandom(bytes.data(), count, 0) != static_cast<ssize_t>(count)) return unexpected(system_failure("getrandom"));
  return bytes;
}

struct UnixAddress {
  sockaddr_un address{};
  socklen_t length = 0;
  explicit UnixAddress(const std::string& name) {
    address.sun_family = AF_UNIX;
    // A leading zero byte makes it abstract (unix(7)).
    std::memcpy(address.sun_path + 1, name.data(), std::min(name.size(), sizeof address.sun_path - 1));
    length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address); }
};

// SEQPACKET keeps message and descriptor together.
Fd unix_socket() { return Fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)); }

bool same_user(int socket) {
  ucred peer = {};
  socklen_t length = sizeof peer;
  return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && peer.uid == geteuid();
}

// The control data of one descriptor, aligned as cmsg(3) wants it.
union Control {
  cmsghdr header;
  std::array<char, CMSG_SPACE(sizeof(int))> space;
};

bool send_message(int socket, Message message, int fd) {
  iovec data{.iov_base = &message, .iov_len = sizeof message};
  Control control = {};
  msghdr header = {};
  header.msg_iov = &data;
  header.msg_iovlen = 1;
  header.msg_control = &control;
  header.msg_controllen = sizeof control.space;
  cmsghdr* rights = CMSG_FIRSTHDR(&header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof fd);
  std::memcpy(CMSG_DATA(rights), &fd, sizeof fd);
  return sendmsg(socket, &header, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof message);
}

struct Received {
  Message message;
  Fd fd;
};

// Nothing for a message that is not one of ours.
std::optional<Received> receive_message(int socket) {
  Received received = {};
  iovec data{.iov_base = &received.message, .iov_len = sizeof received.message};
  Control control = {};
  msghdr header = {};
  header.msg_iov = &data;
  header.msg_iovlen = 1;
  header.msg_control = &control;
  header.msg_controllen = sizeof control.space;
  const ssize_t bytes = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
  const cmsghdr* rights = bytes >= 0 ? CMSG_FIRSTHDR(&header) : nullptr;
  const bool passes_fd = rights != nullptr && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS;
  if (passes_fd && rights->cmsg_len == CMSG_LEN(sizeof(int))) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(rights), sizeof fd);
    received.fd = Fd(fd);
  }
  if (bytes != static_cast<ssize_t>(sizeof received.message) || !received.fd) return std::nullopt;
  return received;
}

Failure lost_peer(int peer) {
  return {.kind = FailureKind::peer_lost, .phase = Phase::memory, .peer = peer, .detail = "it ended before it passed its memory"};
}

// A rank that is gone. The sockets of a dying process close a moment before its death can be seen.
std::optional<int> find_lost(const World& world) {
  constexpr int kDyingMs = 200;
  for (const Deadline deadline = Deadline::after_ms(kDyingMs); !deadline.expired(); std::this_thread::sleep_for(kTick)) {
    for (int rank = 0; rank < world.size(); ++rank) {
      if (!world.alive(rank)) return rank;
    }
  }
  return std::nullopt;
}

// `what` failed, by errno. The peer is going, or has given up because another rank is gone: that one is to be named.
Failure unreachable(const World& world, int peer, const char* what) {
  Failure failure = system_failure(fmt::format("{} rank {}", what, peer));
  failure.peer = peer;
  const auto lost = find_lost(world);
  return lost ? lost_peer(*lost) : failure;
}

Expected<void> send_to(const World& world, int peer, const FdExchange::Endpoint& to, int fd, Deadline deadline) {
  Message message{.secret = {}, .rank = world.rank()};
  if (to.secret.size() != kSecretBytes) {
    return unexpected({.kind = FailureKind::mismatch, .phase = Phase::memory, .peer = peer, .detail = "its endpoint is malformed"});
  }
  std::memcpy(message.secret.data(), to.secret.data(), kSecretBytes);
  const UnixAddress address(to.address);
  const Fd socket = unix_socket();
  if (!socket) return unexpected(system_failure("cannot open a Unix socket"));
  // Connecting does not wait for the peer to accept, unless its backlog is full.
  while (connect(socket.get(), address.get(), address.length) != 0) {
    if (errno != EAGAIN && errno != EINTR) return unexpected(unreachable(world, peer, "cannot reach the memory socket of"));
    if (!world.alive(peer)) return unexpected(lost_peer(peer));
    if (deadline.expired()) {
      return unexpected({.kind = FailureKind::timeout, .phase = Phase::memory, .peer = peer, .detail = "it does not accept shared memory"});
    }
    std::this_thread::sleep_for(kTick);
  }
  // Whoever took over the name of a rank that has gone must not get our memory.
  if (!same_user(socket.get()) || !send_message(socket.get(), message, fd)) {
    return unexpected(unreachable(world, peer, "cannot pass memory to"));
  }
  return {};
}

}  // namespace

Expected<FdExchange> FdExchange::listen() {
  const auto name = random_bytes(16);
  if (!name) return unexpected(name.error());
  auto secret = random_bytes(kSecretBytes);
  if (!secret) return unexpected(secret.error());
  FdExchange exchange;
  exchange.endpoint_.address = fmt::format("tokenyard-{}-", getpid());
  for (const char c : *name) exchange.endpoint_.address += fmt::format("{:02x}", static_cast<unsigned char>(c));
  exchange.endpoint_.secret = std::move(*secret);
  exchange.listener_ = unix_socket();
  const UnixAddress address(exchange.endpoint_.address);
  if (!exchange.listener_ || bind(exchange.listener_.get(), address.get(), address.length) != 0 ||
      ::listen(exchange.listener_.get(), SOMAXCONN) != 0) {
    return unexpected(system_failure("cannot listen on an abstract Unix socket"));
  }
  return exchange;
}

Expected<std::vector<Fd>> FdExchange::swap(const World& world, const std::vector<Endpoint>& endpoints, int fd, Deadline deadline) const {
  // All send before they accept: sending never waits for a peer's progress, so this cannot lock up.
  for (int peer = 0; peer < world.size(); ++peer) {
    if (peer == world.rank()) continue;
    if (auto sent = send_to(world, peer, endpoints[peer], fd, deadline); !sent) return unexpected(std::move(sent.error()));
  }
  std::vector<Fd> fds(world.size());
  int missing = world.size() - 1;
  std::vector<Fd> callers;  // accepted, and silent so far
  while (missing > 0) {
    std::vector<pollfd> polled{{.fd = listener_.get(), .events = POLLIN, .revents = 0}};
    for (const Fd& caller : callers) polled.push_back({.fd = caller.get(), .events = POLLIN, .revents = 0});
    poll(polled.data(), polled.size(), std::min(deadline.remaining_ms(), static_cast<int>(kTick.count())));
    for (std::size_t i = callers.size(); i-- > 0;) {
      if (polled[i + 1].revents == 0) continue;
      auto received = receive_message(callers[i].get());
      callers.erase(callers.begin() + static_cast<std::ptrdiff_t>(i));
      const bool ours = received && received->message.rank >= 0 && received->message.rank < world.size() &&
                        received->message.rank != world.rank() && !fds[received->message.rank] &&
                        std::memcmp(received->message.secret.data(), endpoint_.secret.data(), kSecretBytes) == 0;
      if (!ours) {
        log_warn("rank {}: refused a message on its memory socket that no rank of this world sent", world.rank());
        continue;
      }
      fds[received->message.rank] = std::move(received->fd);
      --missing;
    }
    if (Fd caller(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)); caller) {
      if (same_user(caller.get())) callers.push_back(std::move(caller));
      continue;
    }
    for (int peer = 0; peer < world.size(); ++peer) {
      if (peer == world.rank() || fds[peer]) continue;
      if (!world.alive(peer)) return unexpected(lost_peer(peer));
      if (deadline.expired()) {
        return unexpected({.kind = FailureKind::timeout,
                           .phase = Phase::memory,
                           .peer = peer,
                           .expected = world.size() - 1,
                           .seen = world.size() - 1 - missing,
                           .detail = "it did not pass its memory"});
      }
    }
  }
  return fds;
}

}  // namespace tokenyard
