#include "tokenyard/topo.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "world.h"

namespace tokenyard::python {
namespace {

std::vector<std::vector<std::string>> link_names(const Topology& topology) {
  std::vector<std::vector<std::string>> names;
  for (const std::vector<LinkKind>& row : topology.links) {
    names.emplace_back();
    for (const LinkKind kind : row) names.back().emplace_back(name(kind));
  }
  return names;
}

}  // namespace

void bind_topo(nb::module_& m) {
  nb::class_<Backend>(m, "Backend", "One way to move rows: whether it works here and, if not, why and what helps.")
      .def_ro("name", &Backend::name)
      .def_ro("kind", &Backend::kind)
      .def_prop_ro("availability", [](const Backend& self) { return name(self.availability); })
      .def_ro("reason", &Backend::reason)
      .def_ro("remedy", &Backend::remedy);
  nb::class_<Gpu>(m, "Gpu")
      .def_ro("name", &Gpu::name)
      .def_ro("bus_id", &Gpu::bus_id)
      .def_ro("compute_capability", &Gpu::compute_capability)
      .def_ro("num_sms", &Gpu::num_sms)
      .def_ro("memory_bytes", &Gpu::memory_bytes);
  nb::class_<GpuTopology>(m, "GpuTopology").def_ro("gpus", &GpuTopology::gpus).def_ro("peer_access", &GpuTopology::peer_access);
  nb::class_<Topology>(m, "Topology", "Ranks, hosts [R] and links [R][R]: self, peer or network.")
      .def_ro("ranks", &Topology::ranks)
      .def_ro("hosts", &Topology::hosts)
      .def_prop_ro("links", link_names);
  m.def("backends", &backends);
  m.def("gpu_topology", &gpu_topology);
  m.def(
      "topology",
      [](const RankWorld& world) {
        const World mine = world.world();
        return waiting([&] { return topology(mine); });
      },
      nb::arg("world"));
}

}  // namespace tokenyard::python
