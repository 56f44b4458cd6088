#include "tokenyard/collective.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "collectives.h"
#include "world.h"

namespace tokenyard::python {
namespace {

using Counts = std::vector<std::int64_t>;

using Held = HeldCollectives;

void make(Held* self, const RankWorld& world, std::int64_t staging_bytes, const std::string& transport, int timeout_ms) {
  const World mine = world.world();
  const CollectiveOptions options{.staging_bytes = staging_bytes, .transport = parse_transport(transport), .timeout_ms = timeout_ms};
  new (self) Held{WithoutGil<Collectives>(waiting([&] { return Collectives::create(mine, options); }))};
}

}  // namespace

void bind_collective(nb::module_& m) {
  nb::class_<Held>(m, "Collectives")
      .def("__init__", make, nb::arg("world"), nb::arg("staging_bytes"), nb::arg("transport"), nb::arg("timeout_ms"))
      .def("barrier", [](Held& self) { waiting([&] { self.collectives->barrier(); }); })
      .def(
          "all_gather_v",
          [](Held& self, const Tensor& in, const Counts& counts, const Tensor& out) {
            waiting([&] { self.collectives->all_gather_v(in.view(), counts, out.writable()); });
          },
          nb::arg("input"), nb::arg("counts"), nb::arg("out"))
      .def(
          "reduce_scatter_v",
          [](Held& self, const Tensor& in, const Counts& counts, const Tensor& out) {
            waiting([&] { self.collectives->reduce_scatter_v(in.view(), counts, out.writable()); });
          },
          nb::arg("input"), nb::arg("counts"), nb::arg("out"))
      .def(
          "all_to_all_v",
          [](Held& self, const Tensor& in, const Counts& sent, const Tensor& out, const Counts& received) {
            waiting([&] { self.collectives->all_to_all_v(in.view(), sent, out.writable(), received); });
          },
          nb::arg("input"), nb::arg("send_counts"), nb::arg("out"), nb::arg("receive_counts"))
      .def("transport", [](const Held& self) { return name(self.collectives->transport()); });
}

}  // namespace tokenyard::python
