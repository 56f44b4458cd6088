#pragma once
// The store's side of its connections, without sockets or threads: bytes in, bytes out. Only rank connections that said a
// right hello reach the ledger; a bad one is told why and closed, and disturbs nobody.

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "world/frame.h"
#include "world/ledger.h"

namespace tokenyard::world_internal {

// Bytes to send: `head`, then `tail`, which may be shared between connections.
struct Chunk {
  std::vector<std::byte> head;
  SharedPart tail;
  std::size_t sent = 0;

  // The two pieces that are not sent yet.
  std::span<const std::byte> rest_of_head() const { return std::span(head).subspan(std::min(sent, head.size())); }
  std::span<const std::byte> rest_of_tail() const {
    if (!tail) return {};
    return std::span(tail->bytes).subspan(sent - std::min(sent, head.size()));
  }
  // Counts up to `bytes` as sent, and takes them off; returns whether the whole chunk is.
  bool take(std::size_t& bytes) {
    const std::size_t taken = std::min(bytes, rest_of_head().size() + rest_of_tail().size());
    sent += taken;
    bytes -= taken;
    return rest_of_head().empty() && rest_of_tail().empty();
  }
};

class ServerProtocol {
 public:
  using Time = Deadline::Clock::time_point;
  static constexpr int kHelloTimeoutMs = 10'000;
  static constexpr int kMaxOpenGathers = 1024;  // of one rank: one per world and thread that uses it

  struct Connection {
    std::deque<Chunk> outgoing;  // the owner of the sockets takes from the front
    bool closing = false;        // nothing more is read; close it when `outgoing` is empty

   private:
    friend class ServerProtocol;
    explicit Connection(std::string from) : from_(std::move(from)) {}
    std::string from_;
    FrameReader reader_{kMaxHelloBytes};
    Time hello_by_;
    std::uint32_t sequence_ = 0;  // of the next frame to it
    int rank_ = -1;               // before its hello
    int open_gathers_ = 0;
  };

  ServerProtocol(int size, std::string token);

  // A connection from `from` (for people); the reference stays valid until close(id).
  Connection& open(int id, std::string from, Time now);
  void receive(int id, std::span<const std::byte> bytes);
  // The connection has ended, for `reason`.
  void close(int id, const std::string& reason);
  // From somebody who knows, such as the launcher.
  void lose(int rank, const std::string& reason);
  // Deadlines that have passed; next_deadline() is when to come back.
  void tick(Time now);
  std::optional<Time> next_deadline() const;
  // Connections of ranks that have not said bye, but for that of one rank.
  int num_connected(int but_rank = -1) const;
  // Connections that have not said hello.
  int num_strangers() const;

 private:
  void handle(Connection& connection, Message&& message);
  void greet(Connection& connection, const Hello& hello);
  void gather(Connection& connection, GatherRequest&& request);
  void reject(Connection& connection, const std::string& reason);
  void announce(int rank);
  void deliver(int rank, GatherKey key, const Ledger::Outcome& outcome);
  void send(Connection& connection, const Message& message);

  std::string token_;
  Ledger ledger_;
  std::map<int, Connection> connections_;
  std::vector<Connection*> ranks_;  // connection of each rank, null before its hello and after its end
  std::vector<bool> greeted_;       // a rank joins once
};

}  // namespace tokenyard::world_internal
