// What a dispatch gave: handles and rows.

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "tokenyard/exchange.h"

namespace tokenyard::python {
namespace {

// An array of what a Received shows. It holds the lease of rows; metadata needs the handle alone.
template <auto kRows>
nb::object rows(const Received& self, const Place& place) {
  return export_array((self.*kRows)(), std::make_shared<Received>(self), place);
}
template <auto kMetadata>
nb::object metadata(const Received& self, const Place& place) {
  return export_array((self.*kMetadata)(), std::make_shared<Handle>(self.handle()), place);
}

std::vector<std::int64_t> rows_shape(const Received& self) {
  const TensorView view = self.rows();
  return {view.shape.begin(), view.shape.begin() + view.ndim};
}

}  // namespace

void bind_received(nb::module_& m) {
  nb::class_<Handle>(m, "Handle", "What one dispatch learned, and combine needs. Owns its memory; reusable any number of times.")
      .def_prop_ro("layout", [](const Handle& self) { return name(self.layout()); })
      .def_prop_ro("mode", [](const Handle& self) { return name(self.mode()); })
      .def_prop_ro("placement", &Handle::placement, "What Exchange.add() returned for the placement of the dispatch.")
      .def_prop_ro("num_tokens", &Handle::num_tokens)
      .def_prop_ro("num_rows", &Handle::num_rows, "Token rows received; -1 on cuda with sizing = capacity.")
      .def_prop_ro(
          "dropped",
          [](const Handle& self) {
            const auto dropped = waiting([&] { return self.dropped(); });
            return std::vector<std::int64_t>(dropped.begin(), dropped.end());
          },
          "Rows dropped per local expert.");
  nb::class_<Received>(m, "Received")
      .def("rows", rows<&Received::rows>, nb::arg("place"))
      .def("scales", rows<&Received::scales>, nb::arg("place"))
      .def("rows_shape", rows_shape)
      .def(
          "read_on", [](Received& self, std::uintptr_t stream) { self.read_on(reinterpret_cast<void*>(stream)); }, nb::arg("stream"))
      .def_prop_ro("num_rows", &Received::num_rows)
      .def_prop_ro("handle", &Received::handle, nb::rv_policy::copy)
      .def("num_rows_device", metadata<&Received::num_rows_device>, nb::arg("place"))
      .def("local_ids", metadata<&Received::local_ids>, nb::arg("place"))
      .def("row_weights", metadata<&Received::row_weights>, nb::arg("place"))
      .def("source_rank", metadata<&Received::source_rank>, nb::arg("place"))
      .def("source_token", metadata<&Received::source_token>, nb::arg("place"))
      .def("source_k", metadata<&Received::source_k>, nb::arg("place"))
      .def("expert_counts", metadata<&Received::expert_counts>, nb::arg("place"))
      .def("expert_offsets", metadata<&Received::expert_offsets>, nb::arg("place"))
      .def("expert_rows", metadata<&Received::expert_rows>, nb::arg("place"))
      .def("rank_counts", metadata<&Received::rank_counts>, nb::arg("place"))
      .def("sent_counts", metadata<&Received::sent_counts>, nb::arg("place"))
      .def("ranges", metadata<&Received::ranges>, nb::arg("place"))
      .def("present", metadata<&Received::present>, nb::arg("place"));
}

}  // namespace tokenyard::python
