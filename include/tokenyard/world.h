#pragma once
// A world: a set of ranks, how they found each other, and what each pair can do.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tokenyard {

// What a pair of ranks can do: nothing to do, write each other's memory, or only a network.
enum class LinkKind : std::uint8_t { self, peer, network };
std::string_view name(LinkKind kind);

struct WorldOptions {
  int rank = 0;
  int size = 1;
  int local_rank = 0;
  std::string address = "127.0.0.1";  // of the store
  int port = 0;                       // of the store; rank 0 listens there unless `store_elsewhere`
  bool store_elsewhere = false;       // a launcher already listens on `port`
  std::string token{};                // shared secret; required when `address` is not loopback
  int timeout_ms = 100'000;
};

namespace world_internal {
struct State;
}
struct Survivors;

// A handle; copies name the same world. Calls on one world are externally serialised per rank, and ranks make them in the
// same order. Every wait has the world's deadline; TransportError names the ranks that are missing or lost.
class World {
 public:
  // RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and TOKENYARD_PORT (default MASTER_PORT + 1), TOKENYARD_TOKEN,
  // TOKENYARD_TIMEOUT_MS, TOKENYARD_STORE (1: a launcher holds the store). Under mpirun its OMPI_COMM_WORLD_RANK, _SIZE and
  // _LOCAL_RANK stand in for the first three. Without any rank: a world of one.
  static World from_env();
  // Where rank 0 holds the store, the end of its last handle waits, within timeout_ms, for the other ranks to close theirs.
  static World connect(const WorldOptions& options);
  // `size` ranks of this process, one per thread; element r belongs to rank r.
  static std::vector<World> in_process(int size, int timeout_ms = 100'000);

  int rank() const;
  int size() const;
  int local_rank() const;
  int timeout_ms() const;
  // Whether all ranks are threads of this process.
  bool is_in_process() const;
  LinkKind link(int peer) const;
  std::string host(int peer) const;
  // A number that two worlds of one rendezvous never share; equal on all ranks of this world.
  std::uint64_t generation() const;

  // Collective over small control data (< 16 MiB per rank): element r is what rank r gave.
  std::vector<std::vector<std::byte>> all_gather(std::span<const std::byte> mine) const;
  void barrier() const;
  // Collective. Ranks with the same color form a sub-world, numbered by (key, rank); color < 0: no world (nullopt).
  std::optional<World> split(int color, int key) const;

  // Collective over the ranks that are left, once per world: returns when every rank has called it or is lost. A rank that has not
  // come by the deadline of the first is given up: it gets an error if it comes later. The survivors keep their order.
  Survivors survivors() const;

  // False once the rank's process has ended or, in process, its thread has left with an exception. Never blocks.
  bool alive(int peer) const;
  // Marks this rank as lost for the others, in all worlds of its rendezvous (a rank thread that gives up; processes need not
  // call it). A rank whose handles are all gone has left in order: calls that include it fail, but it stays alive().
  void leave() const;

  const std::shared_ptr<world_internal::State>& state() const { return state_; }

 private:
  explicit World(std::shared_ptr<world_internal::State> state) : state_(std::move(state)) {}
  friend struct world_internal::State;
  std::shared_ptr<world_internal::State> state_;
};

struct Survivors {
  World world;
  std::vector<int> ranks;  // of the world they come from, ascending: element r is now rank r
};

// Runs fn(world) on `size` rank threads and joins them. A rank that throws is marked lost, so that the others fail in
// milliseconds; the error of the lowest rank that failed first is rethrown.
void run_ranks(int size, const std::function<void(World&)>& fn, int timeout_ms = 100'000);

}  // namespace tokenyard
