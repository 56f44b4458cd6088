#include "world/server_protocol.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/log.h"
#include "core/usage.h"

namespace tokenyard::world_internal {

ServerProtocol::ServerProtocol(int size, std::string token)
    : token_(std::move(token)),
      ledger_(
          size, [this](int rank, GatherKey key, const Ledger::Outcome& outcome) { deliver(rank, key, outcome); },
          [this](int rank) { announce(rank); }),
      ranks_(size),
      greeted_(size) {}

ServerProtocol::Connection& ServerProtocol::open(int id, std::string from, Time now) {
  const auto [at, created] = connections_.emplace(id, Connection(std::move(from)));
  TY_ASSERT(created);
  at->second.hello_by_ = now + std::chrono::milliseconds(kHelloTimeoutMs);
  return at->second;
}

void ServerProtocol::receive(int id, std::span<const std::byte> bytes) {
  Connection& connection = connections_.at(id);
  if (connection.closing) return;
  connection.reader_.feed(bytes);
  while (!connection.closing) {
    auto message = connection.reader_.next();
    if (!message) return reject(connection, message.error());
    if (!*message) return;
    handle(connection, std::move(**message));
  }
}

void ServerProtocol::handle(Connection& connection, Message&& message) {
  const bool known = connection.rank_ >= 0;
  if (const auto* hello = std::get_if<Hello>(&message); hello != nullptr && !known) {
    greet(connection, *hello);
  } else if (auto* request = std::get_if<GatherRequest>(&message); request != nullptr && known) {
    gather(connection, std::move(*request));
  } else if (const auto* give_up = std::get_if<GiveUp>(&message); give_up != nullptr && known) {
    lose(connection.rank_, give_up->reason);
  } else if (std::holds_alternative<Bye>(message) && known) {
    ranks_[connection.rank_] = nullptr;
    connection.closing = true;
    ledger_.close(connection.rank_);
  } else {
    reject(connection, fmt::format("a message of type {} {} hello", message.index(), known ? "after" : "before"));
  }
}

void ServerProtocol::greet(Connection& connection, const Hello& hello) {
  // The token comes first: to who does not know it, nothing else is said.
  if (!equal_secrets(hello.token, token_)) return reject(connection, "wrong token: set TOKENYARD_TOKEN to the same secret on all ranks");
  if (hello.size != ledger_.size()) {
    return reject(connection, fmt::format("world size {}, but this store serves {} ranks (WORLD_SIZE)", hello.size, ledger_.size()));
  }
  if (hello.rank < 0 || hello.rank >= ledger_.size()) return reject(connection, fmt::format("rank {} of {}", hello.rank, hello.size));
  if (greeted_[hello.rank]) {
    return reject(connection,
                  fmt::format("rank {} has joined before: do two processes have the same RANK, or two worlds the same port?", hello.rank));
  }
  greeted_[hello.rank] = true;
  connection.rank_ = hello.rank;
  connection.reader_.set_max_body_bytes(kMaxFrameBytes);
  ranks_[hello.rank] = &connection;
  send(connection, Welcome{});
  for (int rank = 0; rank < ledger_.size(); ++rank) {
    if (ledger_.lost(rank)) send(connection, RankLost{rank});
  }
}

void ServerProtocol::gather(Connection& connection, GatherRequest&& request) {
  if (++connection.open_gathers_ > kMaxOpenGathers) return reject(connection, fmt::format("more than {} gathers at once", kMaxOpenGathers));
  auto part = std::make_shared<const Part>(Part{.bytes = std::move(request.bytes), .object = nullptr});
  const auto refused = ledger_.arrive(connection.rank_, request.call, std::move(part), Deadline::after_ms(request.timeout_ms));
  if (refused) reject(connection, *refused);
}

void ServerProtocol::reject(Connection& connection, const std::string& reason) {
  const std::string who = connection.rank_ >= 0 ? fmt::format("rank {}", connection.rank_) : "a client";
  log_warn("store: rejected {} ({}): {}", who, connection.from_, reason);
  send(connection, Reject{reason});
  connection.closing = true;
  if (connection.rank_ < 0) return;
  ranks_[connection.rank_] = nullptr;
  lose(connection.rank_, "was rejected by the store: " + reason);
}

void ServerProtocol::close(int id, const std::string& reason) {
  const auto node = connections_.extract(id);
  TY_ASSERT(node);
  const Connection& connection = node.mapped();
  if (connection.rank_ < 0 || ranks_[connection.rank_] != &connection) return;
  ranks_[connection.rank_] = nullptr;
  lose(connection.rank_, fmt::format("was lost: {}", reason));
}

void ServerProtocol::lose(int rank, const std::string& reason) { ledger_.lose(rank, reason); }

void ServerProtocol::announce(int rank) {
  for (Connection* other : ranks_) {
    if (other != nullptr) send(*other, RankLost{rank});
  }
}

void ServerProtocol::tick(Time now) {
  ledger_.expire(now);
  for (auto& [id, connection] : connections_) {
    if (connection.rank_ < 0 && !connection.closing && now >= connection.hello_by_) {
      reject(connection, fmt::format("no hello within {} ms", kHelloTimeoutMs));
    }
  }
}

std::optional<ServerProtocol::Time> ServerProtocol::next_deadline() const {
  std::optional<Time> next = ledger_.next_deadline();
  for (const auto& [id, connection] : connections_) {
    if (connection.rank_ < 0 && !connection.closing && (!next || connection.hello_by_ < *next)) next = connection.hello_by_;
  }
  return next;
}

int ServerProtocol::num_connected(int but_rank) const {
  return static_cast<int>(
      std::count_if(ranks_.begin(), ranks_.end(), [&](const Connection* c) { return c != nullptr && c->rank_ != but_rank; }));
}

int ServerProtocol::num_strangers() const {
  return static_cast<int>(std::count_if(connections_.begin(), connections_.end(), [](const auto& c) { return c.second.rank_ < 0; }));
}

void ServerProtocol::deliver(int rank, GatherKey key, const Ledger::Outcome& outcome) {
  Connection* connection = ranks_[rank];
  if (connection == nullptr) return;
  --connection->open_gathers_;
  if (!outcome) return send(*connection, GatherFailed{key, outcome.error()});
  for (const SharedPart& part : outcome->parts) {
    connection->outgoing.push_back({encode_part_start(connection->sequence_++, key, part->bytes.size()), part});
  }
  send(*connection, GatherDone{key, outcome->serial});
}

void ServerProtocol::send(Connection& connection, const Message& message) {
  connection.outgoing.push_back({encode(connection.sequence_++, message), nullptr});
}

}  // namespace tokenyard::world_internal
