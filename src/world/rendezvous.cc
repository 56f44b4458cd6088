// How the ranks of different processes find each other, and what they tell each other first.

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "core/usage.h"
#include "world/state.h"
#include "world/tcp_server.h"
#include "world/tcp_store.h"

namespace tokenyard::world_internal {

namespace {

std::atomic<int> farewell_limit_ms = std::numeric_limits<int>::max();

}  // namespace

void limit_farewells(int timeout_ms) { farewell_limit_ms = timeout_ms; }

Session::Session() = default;

Session::~Session() {
  store.reset();
  // The other ranks may still use the store that this rank holds.
  if (server) server->wait_until_unused(Deadline::after_ms(std::min(server_patience_ms, farewell_limit_ms.load())));
}

Expected<std::shared_ptr<State>> rendezvous(const WorldOptions& options) {
  const Deadline deadline = Deadline::after_ms(options.timeout_ms);
  auto socket = resolve(options.address, options.port);
  if (!socket) return unexpected(std::move(socket.error()));
  if (!socket->is_loopback() && options.token.empty()) {
    usage_error("the store's address {} is not loopback and there is no token: set TOKENYARD_TOKEN to a secret that all ranks share",
                socket->text);
  }
  auto state = std::make_shared<State>();
  state->session = std::make_shared<Session>();
  state->rank = options.rank;
  state->timeout_ms = options.timeout_ms;
  for (int rank = 0; rank < options.size; ++rank) state->members.push_back(rank);
  Session& session = *state->session;
  session.server_patience_ms = options.timeout_ms;
  if (options.rank == 0 && !options.store_elsewhere) {
    auto server = TcpServer::start(*socket, options.size, options.token);
    if (!server) return unexpected(std::move(server.error()));
    session.server = std::move(*server);
  }
  const StoreAddress address{.socket = std::move(*socket), .holder = options.store_elsewhere ? -1 : 0};
  auto store = TcpStore::connect(address, {.token = options.token, .size = options.size, .rank = options.rank}, deadline);
  if (!store) return unexpected(std::move(store.error()));
  session.store = std::move(*store);

  const Identity self = Identity::of_this_process(options.local_rank);
  const auto gathered = state->gather(Phase::rendezvous, {.bytes = self.encode(), .object = nullptr}, deadline);
  if (!gathered) return unexpected(gathered.error());
  for (const SharedPart& part : gathered->parts) {
    auto identity = Identity::decode(part->bytes);
    if (!identity) return unexpected(std::move(identity.error()));
    session.watches.emplace_back(self, *identity);
    session.identities.push_back(std::move(*identity));
  }
  return state;
}

}  // namespace tokenyard::world_internal
