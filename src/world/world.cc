#include "tokenyard/world.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <thread>

#include "core/env.h"
#include "core/name_table.h"
#include "core/usage.h"
#include "world/bytes.h"
#include "world/local_store.h"
#include "world/state.h"

namespace tokenyard {

using world_internal::Gathered;
using world_internal::Identity;
using world_internal::LocalHub;
using world_internal::Part;
using world_internal::Session;
using world_internal::SharedPart;
using world_internal::State;

namespace {

constexpr NamedValue<LinkKind> kLinkKinds[] = {{LinkKind::self, "self"}, {LinkKind::peer, "peer"}, {LinkKind::network, "network"}};

void check_peer(const State& state, int peer) {
  const int size = static_cast<int>(state.members.size());
  if (peer < 0 || peer >= size) usage_error("peer {} of a world of {} ranks: expected 0 to {}", peer, size, size - 1);
}

void check_timeout(int timeout_ms) {
  if (timeout_ms < 1) usage_error("timeout_ms = {}: expected at least 1 millisecond", timeout_ms);
}

void check_size(int size) {
  if (size < 1 || size > world_internal::kMaxWorldSize) {
    usage_error("a world of {} ranks: expected 1 to {}", size, world_internal::kMaxWorldSize);
  }
}

// What torchrun and our launcher set, or else mpirun.
std::optional<int> launched_int(const char* name, const char* mpi_name, int low) {
  constexpr int kHigh = world_internal::kMaxWorldSize;
  const auto value = env_int(name, low, kHigh);
  return value ? value : env_int(mpi_name, low, kHigh);
}

std::vector<int> count_up(int size) {
  std::vector<int> numbers(size);
  for (int i = 0; i < size; ++i) numbers[i] = i;
  return numbers;
}

// What a rank says in a split.
struct Choice {
  std::int32_t color;
  std::int32_t key;
};

Part encode(const Choice& choice) {
  world_internal::ByteWriter out;
  out.put(choice.color);
  out.put(choice.key);
  return {.bytes = out.take(), .object = nullptr};
}

Choice decode_choice(const Part& part) {
  world_internal::ByteReader in(part.bytes);
  const auto color = in.get<std::int32_t>();
  return {color, in.get<std::int32_t>()};
}

}  // namespace

std::string_view name(LinkKind kind) { return name_in(kLinkKinds, kind); }

namespace world_internal {

World State::make_world(std::shared_ptr<State> state) { return World(std::move(state)); }

Expected<Gathered> State::gather(Phase phase, Part mine, Deadline deadline) {
  const Call call{.key = {generation, sequence.fetch_add(1, std::memory_order_relaxed)}, .phase = phase, .members = members};
  return session->store->gather(call, std::make_shared<const Part>(std::move(mine)), deadline);
}

Expected<Gathered> State::gather_survivors(Part mine, Deadline deadline) {
  const Call call{.key = {generation, kRecoverSequence}, .phase = Phase::recover, .members = members};
  return session->store->gather(call, std::make_shared<const Part>(std::move(mine)), deadline);
}

Expected<std::vector<SharedPart>> gather(const World& world, Phase phase, Part mine, Deadline deadline) {
  return world.state()->gather(phase, std::move(mine), deadline).map([](Gathered&& gathered) { return std::move(gathered.parts); });
}

}  // namespace world_internal

std::vector<World> World::in_process(int size, int timeout_ms) {
  check_size(size);
  check_timeout(timeout_ms);
  const auto hub = std::make_shared<LocalHub>(size);
  const Identity here = Identity::of_this_process(0);
  std::vector<World> worlds;
  for (int rank = 0; rank < size; ++rank) {
    auto session = std::make_shared<Session>();
    session->in_process = true;
    session->identities.assign(size, here);
    for (int other = 0; other < size; ++other) session->identities[other].local_rank = other;
    session->watches.resize(size);  // threads of this process are not watched; they leave()
    session->store = std::make_unique<world_internal::LocalStore>(hub, rank);
    auto state = std::make_shared<State>();
    state->session = std::move(session);
    state->members = count_up(size);
    state->rank = rank;
    state->timeout_ms = timeout_ms;
    worlds.push_back(State::make_world(std::move(state)));
  }
  return worlds;
}

World World::connect(const WorldOptions& options) {
  check_size(options.size);
  check_timeout(options.timeout_ms);
  if (options.rank < 0 || options.rank >= options.size) {
    usage_error("rank {} of a world of {} ranks: expected 0 to {}", options.rank, options.size, options.size - 1);
  }
  const bool needs_store = options.size > 1 || options.store_elsewhere;
  if (!needs_store) return in_process(1, options.timeout_ms).front();
  if (options.port < 1 || options.port > 65535) usage_error("port {} of the store: expected 1 to 65535 (TOKENYARD_PORT)", options.port);
  return State::make_world(value_or_throw(world_internal::rendezvous(options)));
}

World World::from_env() {
  WorldOptions options;
  options.timeout_ms = env_int("TOKENYARD_TIMEOUT_MS", 1, 1'000'000'000).value_or(options.timeout_ms);
  const auto rank = launched_int("RANK", "OMPI_COMM_WORLD_RANK", 0);
  if (!rank) return in_process(1, options.timeout_ms).front();
  const auto size = launched_int("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", 1);
  if (!size) usage_error("RANK={} is set but WORLD_SIZE is not; set both, or neither for a world of one rank", *rank);
  options.rank = *rank;
  options.size = *size;
  options.local_rank = launched_int("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", 0).value_or(0);
  options.address = env("MASTER_ADDR").value_or(options.address);
  options.token = env("TOKENYARD_TOKEN").value_or("");
  options.store_elsewhere = env_int("TOKENYARD_STORE", 0, 1).value_or(0) == 1;
  if (const auto port = env_int("TOKENYARD_PORT", 1, 65535)) {
    options.port = *port;
  } else if (const auto master_port = env_int("MASTER_PORT", 1, 65534)) {
    options.port = *master_port + 1;  // the port itself belongs to the launcher that set it
  } else if (options.size > 1) {
    usage_error("RANK={} and WORLD_SIZE={} are set but neither TOKENYARD_PORT nor MASTER_PORT is; set one of them", *rank, *size);
  }
  return connect(options);
}

int World::rank() const { return state_->rank; }
int World::size() const { return static_cast<int>(state_->members.size()); }
int World::local_rank() const { return state_->identity(state_->rank).local_rank; }
int World::timeout_ms() const { return state_->timeout_ms; }
bool World::is_in_process() const { return state_->session->in_process; }
std::uint64_t World::generation() const { return state_->generation; }

LinkKind World::link(int peer) const {
  check_peer(*state_, peer);
  if (peer == rank()) return LinkKind::self;
  if (is_in_process()) return LinkKind::peer;
  return link_between(state_->identity(rank()), state_->identity(peer));
}

std::string World::host(int peer) const {
  check_peer(*state_, peer);
  return state_->identity(peer).host;
}

std::vector<std::vector<std::byte>> World::all_gather(std::span<const std::byte> mine) const {
  if (mine.size() > world_internal::kMaxPartBytes) {
    usage_error("all_gather of {} bytes per rank: control data is limited to {}; use Collectives for more", mine.size(),
                world_internal::kMaxPartBytes);
  }
  Part part{.bytes = {mine.begin(), mine.end()}, .object = nullptr};
  const Gathered gathered = value_or_throw(state_->gather(Phase::gather, std::move(part), Deadline::after_ms(timeout_ms())));
  std::vector<std::vector<std::byte>> all;
  for (const SharedPart& one : gathered.parts) all.push_back(one->bytes);
  return all;
}

void World::barrier() const { value_or_throw(state_->gather(Phase::barrier, {}, Deadline::after_ms(timeout_ms()))); }

Survivors World::survivors() const {
  world_internal::ByteWriter mine;
  mine.put(static_cast<std::int32_t>(rank()));
  const Gathered gathered =
      value_or_throw(state_->gather_survivors({.bytes = mine.take(), .object = nullptr}, Deadline::after_ms(timeout_ms())));
  auto left = std::make_shared<State>();
  left->session = state_->session;
  left->timeout_ms = state_->timeout_ms;
  left->generation = gathered.serial;
  std::vector<int> ranks;
  for (const SharedPart& part : gathered.parts) {
    const auto survivor = world_internal::ByteReader(part->bytes).get<std::int32_t>();
    check_peer(*state_, survivor);
    if (survivor == rank()) left->rank = static_cast<int>(ranks.size());
    left->members.push_back(state_->members[survivor]);
    ranks.push_back(survivor);
  }
  return {World(std::move(left)), std::move(ranks)};
}

std::optional<World> World::split(int color, int key) const {
  const Gathered gathered = value_or_throw(state_->gather(Phase::split, encode({color, key}), Deadline::after_ms(timeout_ms())));
  // (key, rank) of my color; the first rank of a color numbers its sub-world.
  std::vector<std::pair<int, int>> order;
  int founder = -1;
  for (int other = 0; other < size(); ++other) {
    const Choice choice = decode_choice(*gathered.parts[other]);
    if (choice.color != color) continue;
    if (founder < 0) founder = other;
    order.emplace_back(choice.key, other);
  }
  if (color < 0) return std::nullopt;
  std::sort(order.begin(), order.end());
  auto sub = std::make_shared<State>();
  sub->session = state_->session;
  sub->timeout_ms = state_->timeout_ms;
  sub->generation = gathered.serial + founder;
  for (const auto& [_, member] : order) {
    if (member == rank()) sub->rank = static_cast<int>(sub->members.size());
    sub->members.push_back(state_->members[member]);
  }
  return World(std::move(sub));
}

bool World::alive(int peer) const {
  check_peer(*state_, peer);
  const int member = state_->members[peer];
  return !state_->session->store->lost(member) && !state_->session->watches[member].ended();
}

void World::leave() const { state_->session->store->give_up("left its world"); }

namespace {

// The error to report of a run: the lowest rank's that is no TransportError, which may be the consequence of another rank's
// error; else the first that was raised.
std::exception_ptr root_cause(std::vector<std::pair<int, std::exception_ptr>> errors) {
  auto first = errors.front().second;
  std::stable_sort(errors.begin(), errors.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (const auto& [rank, error] : errors) {
    try {
      std::rethrow_exception(error);
    } catch (const TransportError&) {
    } catch (...) {
      return error;
    }
  }
  return first;
}

}  // namespace

void run_ranks(int size, const std::function<void(World&)>& fn, int timeout_ms) {
  std::mutex mutex;
  std::vector<std::pair<int, std::exception_ptr>> errors;  // in the order in which they were raised
  const auto body = [&](World world) {
    try {
      fn(world);
    } catch (...) {
      {
        const std::lock_guard lock(mutex);
        errors.emplace_back(world.rank(), std::current_exception());
      }
      world.leave();
    }
  };
  {
    std::vector<std::jthread> threads;  // joined after the worlds below are closed, also when a thread cannot be started
    for (World& world : World::in_process(size, timeout_ms)) threads.emplace_back(body, std::move(world));
  }
  if (!errors.empty()) std::rethrow_exception(root_cause(std::move(errors)));
}

}  // namespace tokenyard
