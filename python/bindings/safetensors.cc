#include "tokenyard/safetensors.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "core/usage.h"

namespace tokenyard::python {
namespace {

std::optional<std::string> dtype_of(const Checkpoint& self, const std::string& tensor) {
  const FileTensor& found = self.tensor(tensor);
  if (!found.dtype) return std::nullopt;
  return std::string(name(*found.dtype));
}

// The bytes as they are in the file, which stays mapped as long as the array lives.
nb::object bytes_of(const Checkpoint& self, const std::string& tensor, const Place& place) {
  const FileTensor& found = self.tensor(tensor);
  const ConstTensorView view(found.bytes.data(), Dtype::uint8, {std::ssize(found.bytes)});
  return export_array(view, std::make_shared<Checkpoint>(self), place);
}

std::span<const std::byte> dense_bytes(const Tensor& tensor) {
  const ConstTensorView& view = tensor.view();
  const bool dense = view.rows_contiguous() && (view.shape[0] <= 1 || view.strides[0] * view.shape[0] == view.num_elements());
  if (!dense) usage_error("{} is not dense; write contiguous tensors", describe(view));
  return {static_cast<const std::byte*>(view.data), static_cast<std::size_t>(view.num_elements() * size_of(view.dtype))};
}

}  // namespace

void bind_safetensors(nb::module_& m) {
  nb::class_<Checkpoint>(m, "Checkpoint")
      .def_static("open", &Checkpoint::open, nb::arg("path"))
      .def("contains", &Checkpoint::contains, nb::arg("name"))
      .def("names", &Checkpoint::names)
      .def("file_of", &Checkpoint::file_of, nb::arg("name"))
      .def("dtype", dtype_of, nb::arg("name"))
      .def(
          "type", [](const Checkpoint& self, const std::string& tensor) { return self.tensor(tensor).type; }, nb::arg("name"))
      .def(
          "shape", [](const Checkpoint& self, const std::string& tensor) { return self.tensor(tensor).shape; }, nb::arg("name"))
      .def("bytes", bytes_of, nb::arg("name"), nb::arg("place"));
  nb::class_<TensorPlan>(m, "TensorPlan", "A tensor that a file is to have: name, dtype, shape.")
      .def(
          "__init__",
          [](TensorPlan* self, std::string tensor, const std::string& dtype, std::vector<std::int64_t> shape) {
            new (self) TensorPlan{std::move(tensor), parse_dtype(dtype), std::move(shape)};
          },
          nb::arg("name"), nb::arg("dtype"), nb::arg("shape"))
      .def_ro("name", &TensorPlan::name)
      .def_prop_ro("dtype", [](const TensorPlan& self) { return name(self.dtype); })
      .def_ro("shape", &TensorPlan::shape);
  nb::class_<SafetensorsWriter>(m, "SafetensorsWriter")
      .def(
          "__init__",
          [](SafetensorsWriter* self, std::string path, std::vector<TensorPlan> tensors,
             const std::map<std::string, std::string>& metadata) {
            new (self) SafetensorsWriter(std::move(path), std::move(tensors), metadata);
          },
          nb::arg("path"), nb::arg("tensors"), nb::arg("metadata"))
      .def(
          "write",
          [](SafetensorsWriter& self, const std::string& tensor, const Tensor& value) {
            const std::span<const std::byte> bytes = dense_bytes(value);
            waiting([&] { self.write(tensor, bytes); });
          },
          nb::arg("name"), nb::arg("value"))
      .def("finish", &SafetensorsWriter::finish);
}

}  // namespace tokenyard::python
