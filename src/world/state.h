#pragma once
// What a World handle points to, and what other folders may do with it beyond the public header.

#include <atomic>
#include <memory>
#include <span>
#include <vector>

#include "core/deadline.h"
#include "core/expected.h"
#include "tokenyard/world.h"
#include "world/identity.h"
#include "world/store.h"

namespace tokenyard::world_internal {

class TcpServer;

// One rank's part in one rendezvous, shared by the world that came out of it and its sub-worlds.
struct Session {
  Session();
  ~Session();

  bool in_process = false;
  std::vector<Identity> identities;  // of all ranks
  std::vector<ProcessWatch> watches;
  std::unique_ptr<TcpServer> server;  // on rank 0, when no launcher holds it; outlives this rank's own connection
  int server_patience_ms = 0;
  std::unique_ptr<Store> store;
};

struct State {
  std::shared_ptr<Session> session;
  std::vector<int> members;  // session rank of each rank of this world
  int rank = 0;
  int timeout_ms = 0;
  std::uint64_t generation = kRootGeneration;
  std::atomic<std::uint64_t> sequence{0};  // of the next collective call

  // Consumes one call number, also when it fails, so that ranks stay in step.
  Expected<Gathered> gather(Phase phase, Part mine, Deadline deadline);
  // The parts of the ranks that are left; once per world.
  Expected<Gathered> gather_survivors(Part mine, Deadline deadline);
  const Identity& identity(int peer) const { return session->identities[members[peer]]; }

  static World make_world(std::shared_ptr<State> state);
};

// From now on the end of a session waits at most that long for the other ranks of a store that it holds: the process is ending.
void limit_farewells(int timeout_ms);

// Connects to the store (and, on rank 0, starts it) and learns who the other ranks are.
Expected<std::shared_ptr<State>> rendezvous(const WorldOptions& options);

// World::all_gather for callers with their own phase, deadline and way to fail.
Expected<std::vector<SharedPart>> gather(const World& world, Phase phase, Part mine, Deadline deadline);

}  // namespace tokenyard::world_internal
