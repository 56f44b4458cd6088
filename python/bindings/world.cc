// Worlds, and the store where processes meet.

#include "world.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "core/expected.h"
#include "core/usage.h"
#include "world/state.h"
#include "world/tcp_server.h"

namespace tokenyard::python {
namespace {

// The store of ranks that are other processes, held by a process that need not be a rank.
class Store {
 public:
  Store(const std::string& address, int size, const std::string& token) {
    server_ = value_or_throw(world_internal::TcpServer::start(value_or_throw(world_internal::resolve(address, 0)), size, token));
  }
  int port() const { return server_->port(); }
  void lose(int rank, const std::string& reason) { server_->lose(rank, reason); }
  bool wait_until_unused(int timeout_ms, int but_rank) { return server_->wait_until_unused(Deadline::after_ms(timeout_ms), but_rank); }

 private:
  std::unique_ptr<world_internal::TcpServer> server_;
};

nb::bytes to_bytes(const std::vector<std::byte>& bytes) { return nb::bytes(bytes.data(), bytes.size()); }

nb::list all_gather(const RankWorld& self, const nb::bytes& mine) {
  std::vector<std::byte> bytes(mine.size());
  std::memcpy(bytes.data(), mine.c_str(), mine.size());
  const World world = self.world();
  nb::list all;
  for (const auto& one : waiting([&] { return world.all_gather(bytes); })) all.append(to_bytes(one));
  return all;
}

std::vector<RankWorld> in_process(int size, int timeout_ms) {
  std::vector<RankWorld> worlds;
  for (World& world : World::in_process(size, timeout_ms)) worlds.emplace_back(std::move(world));
  return worlds;
}

std::optional<RankWorld> split(const RankWorld& self, int color, int key) {
  const World world = self.world();
  std::optional<World> part = waiting([&] { return world.split(color, key); });
  if (!part) return std::nullopt;
  return RankWorld(std::move(*part));
}

void bind_store(nb::module_& m) {
  using Held = WithoutGil<Store>;
  nb::class_<Held>(m, "Store", "Where ranks of other processes meet; listens on a port that the system chooses.")
      .def(
          "__init__",
          [](Held* self, const std::string& address, int size, const std::string& token) {
            new (self) Held(std::make_unique<Store>(address, size, token));
          },
          nb::arg("address"), nb::arg("size"), nb::arg("token"))
      .def_prop_ro("port", [](const Held& self) { return self->port(); })
      .def(
          "lose", [](Held& self, int rank, const std::string& reason) { self->lose(rank, reason); }, nb::arg("rank"), nb::arg("reason"))
      .def(
          "wait_until_unused",
          [](Held& self, int timeout_ms, int but_rank) {
            const nb::gil_scoped_release released;
            return self->wait_until_unused(timeout_ms, but_rank);
          },
          nb::arg("timeout_ms"), nb::arg("but_rank"));
}

}  // namespace

void bind_world(nb::module_& m) {
  bind_store(m);
  m.def("limit_farewells", world_internal::limit_farewells, nb::arg("timeout_ms"));
  nb::class_<WorldOptions>(m, "WorldOptions")
      .def(nb::init<>())
      .def_rw("rank", &WorldOptions::rank)
      .def_rw("size", &WorldOptions::size)
      .def_rw("local_rank", &WorldOptions::local_rank)
      .def_rw("address", &WorldOptions::address)
      .def_rw("port", &WorldOptions::port)
      .def_rw("store_elsewhere", &WorldOptions::store_elsewhere)
      .def_rw("token", &WorldOptions::token)
      .def_rw("timeout_ms", &WorldOptions::timeout_ms);
  nb::class_<RankWorld>(m, "World")
      .def_static("from_env", [] { return RankWorld(waiting([] { return World::from_env(); })); })
      .def_static(
          "connect", [](const WorldOptions& options) { return RankWorld(waiting([&] { return World::connect(options); })); },
          nb::arg("options"))
      .def_static("in_process", in_process, nb::arg("size"), nb::arg("timeout_ms") = 100'000)
      .def_prop_ro("rank", [](const RankWorld& self) { return self.world().rank(); })
      .def_prop_ro("size", [](const RankWorld& self) { return self.world().size(); })
      .def_prop_ro("local_rank", [](const RankWorld& self) { return self.world().local_rank(); })
      .def_prop_ro("timeout_ms", [](const RankWorld& self) { return self.world().timeout_ms(); })
      .def_prop_ro("generation", [](const RankWorld& self) { return self.world().generation(); })
      .def_prop_ro("is_in_process", [](const RankWorld& self) { return self.world().is_in_process(); })
      .def(
          "link", [](const RankWorld& self, int peer) { return name(self.world().link(peer)); }, nb::arg("peer"))
      .def(
          "host", [](const RankWorld& self, int peer) { return self.world().host(peer); }, nb::arg("peer"))
      .def(
          "alive", [](const RankWorld& self, int peer) { return self.world().alive(peer); }, nb::arg("peer"))
      .def("all_gather", all_gather, nb::arg("mine"))
      .def("barrier",
           [](const RankWorld& self) {
             const World world = self.world();
             waiting([&] { world.barrier(); });
           })
      .def("split", split, nb::arg("color"), nb::arg("key") = 0)
      .def("survivors",
           [](const RankWorld& self) {
             const World world = self.world();
             Survivors left = waiting([&] { return world.survivors(); });
             return std::pair(RankWorld(std::move(left.world)), std::move(left.ranks));
           })
      .def("leave", [](const RankWorld& self) {
        const nb::gil_scoped_release released;
        self.world().leave();
      });
}

}  // namespace tokenyard::python
