#include "world/tcp_server.h"

#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "core/log.h"
#include "core/usage.h"

namespace tokenyard::world_internal {
namespace {

constexpr std::size_t kMaxPieces = 64;  // of one system call
constexpr int kMaxStrangers = 64;
constexpr std::chrono::milliseconds kHangUpTime{1000};
constexpr std::chrono::milliseconds kAcceptPause{100};

// sendmsg only reads, but its argument is shared with recvmsg.
iovec as_iovec(std::span<const std::byte> bytes) { return {const_cast<std::byte*>(bytes.data()), bytes.size()}; }

}  // namespace

Expected<std::unique_ptr<TcpServer>> TcpServer::start(const SocketAddress& address, int size, std::string token) {
  if (!address.is_loopback() && token.empty()) {
    usage_error("a store at {}, which other machines reach, without a token: set TOKENYARD_TOKEN to a secret of all ranks", address.text);
  }
  auto listener = listen_at(address);
  if (!listener) return unexpected(std::move(listener.error()));
  Fd wake_up(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_up) return unexpected(system_failure("eventfd", errno));
  return std::unique_ptr<TcpServer>(new TcpServer(std::move(*listener), std::move(wake_up), size, std::move(token)));
}

TcpServer::TcpServer(Listener listener, Fd wake_up, int size, std::string token)
    : listener_(std::move(listener)), wake_up_(std::move(wake_up)), protocol_(size, std::move(token)), thread_([this] { serve(); }) {}

TcpServer::~TcpServer() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake();
  thread_.join();
}

void TcpServer::wake() {
  // Fails only when the counter is full, and then the thread is awake anyway.
  eventfd_write(wake_up_.get(), 1);
}

void TcpServer::lose(int rank, const std::string& reason) {
  {
    const std::lock_guard lock(mutex_);
    protocol_.lose(rank, reason);
  }
  wake();
}

bool TcpServer::wait_until_unused(Deadline deadline, int but_rank) {
  std::unique_lock lock(mutex_);
  return unused_.wait_until(lock, deadline.at(), [&] { return protocol_.num_connected(but_rank) == 0; });
}

void TcpServer::serve() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    std::vector<pollfd> events = wanted_events();
    std::vector<int> ids;
    for (const auto& [id, client] : clients_) ids.push_back(id);
    const int timeout_ms = poll_timeout_ms();
    lock.unlock();
    poll(events.data(), events.size(), timeout_ms);
    lock.lock();
    const Time now = Deadline::Clock::now();
    eventfd_t rung = 0;
    eventfd_read(wake_up_.get(), &rung);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if ((events[i + 2].revents & ~POLLOUT) != 0) read_from(ids[i]);
    }
    if (events[1].revents != 0) accept_all(now);
    protocol_.tick(now);
    for (const auto& [id, client] : clients_) ids.push_back(id);  // those just accepted too; a second visit does no harm
    for (const int id : ids) {
      const auto at = clients_.find(id);
      if (at == clients_.end()) continue;
      write_to(at->second, now);
      if (at->second.drop_at && now >= *at->second.drop_at) drop(id, "it did not hang up");
    }
    if (protocol_.num_connected() <= 1) unused_.notify_all();  // who waits may except one
  }
}

std::vector<pollfd> TcpServer::wanted_events() const {
  const bool may_accept = Deadline::Clock::now() >= accept_after_;
  std::vector<pollfd> events{
      {.fd = wake_up_.get(), .events = POLLIN, .revents = 0},
      {.fd = may_accept ? listener_.fd.get() : -1, .events = POLLIN, .revents = 0},  // poll() skips negative descriptors
  };
  for (const auto& [id, client] : clients_) {
    const bool pending = !client.connection->outgoing.empty();
    events.push_back({.fd = client.fd.get(), .events = static_cast<short>(pending ? POLLIN | POLLOUT : POLLIN), .revents = 0});
  }
  return events;
}

int TcpServer::poll_timeout_ms() const {
  std::optional<Time> next = protocol_.next_deadline();
  const auto consider = [&](Time time) { next = next ? std::min(*next, time) : time; };
  for (const auto& [id, client] : clients_) {
    if (client.drop_at) consider(*client.drop_at);
  }
  const Time now = Deadline::Clock::now();
  if (accept_after_ > now) consider(accept_after_);
  if (!next) return -1;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(*next - now).count();
  return static_cast<int>(std::clamp<std::int64_t>(left, 0, 1'000'000));
}

void TcpServer::accept_all(Time now) {
  while (true) {
    Fd fd(accept4(listener_.fd.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return;
      log_warn("store: cannot accept a connection: {}", std::strerror(errno));
      accept_after_ = now + kAcceptPause;
      return;
    }
    // Everybody may connect; who floods us with silent connections only keeps others like it out.
    if (protocol_.num_strangers() >= kMaxStrangers) {
      log_warn("store: refused a connection: {} others have not said hello yet", kMaxStrangers);
      continue;
    }
    const int on = 1;
    setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    const int id = next_id_++;
    auto& connection = protocol_.open(id, describe_peer(fd.get()), now);
    clients_.emplace(id, Client{std::move(fd), &connection, std::nullopt});
  }
}

void TcpServer::read_from(int id) {
  Client& client = clients_.at(id);
  const ssize_t bytes = recv(client.fd.get(), read_buffer_.data(), read_buffer_.size(), MSG_DONTWAIT);
  if (bytes > 0) return protocol_.receive(id, std::span(read_buffer_).first(static_cast<std::size_t>(bytes)));
  if (bytes == 0) return drop(id, "its connection ended");
  if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) drop(id, std::strerror(errno));
}

void TcpServer::write_to(Client& client, Time now) {
  auto& outgoing = client.connection->outgoing;
  while (!outgoing.empty()) {
    std::vector<iovec> pieces;
    for (const Chunk& chunk : outgoing) {
      if (pieces.size() >= kMaxPieces) break;
      pieces.push_back(as_iovec(chunk.rest_of_head()));
      pieces.push_back(as_iovec(chunk.rest_of_tail()));
    }
    msghdr header = {};
    header.msg_iov = pieces.data();
    header.msg_iovlen = pieces.size();
    const ssize_t sent = sendmsg(client.fd.get(), &header, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) return;  // no room: poll() says when; a broken connection: reading says so
    auto left = static_cast<std::size_t>(sent);
    while (!outgoing.empty() && outgoing.front().take(left)) outgoing.pop_front();
  }
  if (!client.connection->closing || client.drop_at) return;
  // Closing now could discard what the client has not read yet, the reason of a rejection among it.
  shutdown(client.fd.get(), SHUT_WR);
  client.drop_at = now + kHangUpTime;
}

void TcpServer::drop(int id, const std::string& reason) {
  protocol_.close(id, reason);
  clients_.erase(id);
}

}  // namespace tokenyard::world_internal
