#pragma once
// The store for ranks in other processes: one thread and its sockets around ServerProtocol.

#include <poll.h>

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "core/deadline.h"
#include "core/expected.h"
#include "world/server_protocol.h"
#include "world/socket.h"

namespace tokenyard::world_internal {

class TcpServer {
 public:
  // UsageError when the address is not loopback and there is no token.
  static Expected<std::unique_ptr<TcpServer>> start(const SocketAddress& address, int size, std::string token);
  // Ends all connections. What waits for this store then fails, saying so.
  ~TcpServer();

  int port() const { return listener_.port; }
  // From any thread.
  void lose(int rank, const std::string& reason);
  // Until no rank is connected, but for but_rank, or the deadline: a store must not vanish under ranks that still use it.
  // Whether none is.
  bool wait_until_unused(Deadline deadline, int but_rank = -1);

 private:
  using Time = ServerProtocol::Time;
  struct Client {
    Fd fd;
    ServerProtocol::Connection* connection;
    std::optional<Time> drop_at;  // all is said: the client has until then to hear it and hang up
  };

  TcpServer(Listener listener, Fd wake_up, int size, std::string token);
  void serve();
  // The events of every client, in the order of clients_, behind those of wake_up_ and the listener.
  std::vector<pollfd> wanted_events() const;
  int poll_timeout_ms() const;
  void accept_all(Time now);
  void read_from(int id);
  void write_to(Client& client, Time now);
  void drop(int id, const std::string& reason);
  void wake();

  Listener listener_;
  Fd wake_up_;
  std::mutex mutex_;  // around everything below: the thread holds it, except in poll()
  std::condition_variable unused_;
  bool stopping_ = false;
  Time accept_after_{};  // out of descriptors: no use in trying before
  ServerProtocol protocol_;
  std::map<int, Client> clients_;  // by connection id
  int next_id_ = 0;
  std::vector<std::byte> read_buffer_ = std::vector<std::byte>(std::size_t{256} << 10);
  std::thread thread_;
};

}  // namespace tokenyard::world_internal
