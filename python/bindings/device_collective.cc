// Collectives over the memory of GPUs.

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>

#include "arrays.h"
#include "collectives.h"
#include "world.h"

namespace tokenyard::python {
namespace {

using Counts = std::vector<std::int64_t>;

using HeldDevice = HeldDeviceCollectives;

void make(HeldDevice* self, const RankWorld& world, int device_index, int timeout_ms) {
  const World mine = world.world();
  const DeviceCollectiveOptions options{.device_index = device_index, .timeout_ms = timeout_ms};
  new (self) HeldDevice{WithoutGil<DeviceCollectives>(waiting([&] { return DeviceCollectives::create(mine, options); }))};
}

void* as_stream(std::uintptr_t stream) { return reinterpret_cast<void*>(stream); }

}  // namespace

void bind_device_collective(nb::module_& m) {
  nb::class_<HeldDevice>(m, "DeviceCollectives")
      .def("__init__", make, nb::arg("world"), nb::arg("device_index"), nb::arg("timeout_ms"))
      .def(
          "all_gather_v",
          [](HeldDevice& self, std::uintptr_t stream, const Tensor& in, const Counts& counts, const Tensor& out) {
            waiting([&] { self.collectives->all_gather_v(in.view(), counts, out.writable(), as_stream(stream)); });
          },
          nb::arg("stream"), nb::arg("input"), nb::arg("counts"), nb::arg("out"))
      .def(
          "reduce_scatter_v",
          [](HeldDevice& self, std::uintptr_t stream, const Tensor& in, const Counts& counts, const Tensor& out) {
            waiting([&] { self.collectives->reduce_scatter_v(in.view(), counts, out.writable(), as_stream(stream)); });
          },
          nb::arg("stream"), nb::arg("input"), nb::arg("counts"), nb::arg("out"))
      .def(
          "all_to_all_v",
          [](HeldDevice& self, std::uintptr_t stream, const Tensor& in, const Counts& sent, const Tensor& out, const Counts& received) {
            const std::array table{AllToAllRows{in.view(), sent, out.writable(), received}};
            waiting([&] { self.collectives->all_to_all_v(table, as_stream(stream)); });
          },
          nb::arg("stream"), nb::arg("input"), nb::arg("send_counts"), nb::arg("out"), nb::arg("receive_counts"))
      .def(
          "wait", [](HeldDevice& self, std::uintptr_t stream) { waiting([&] { self.collectives->wait(as_stream(stream)); }); },
          nb::arg("stream"))
      .def("library_version", [](const HeldDevice& self) { return self.collectives->library_version(); });
}

}  // namespace tokenyard::python
