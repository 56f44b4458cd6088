#include "arrays.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <vector>

#include "core/usage.h"

namespace tokenyard::python {
namespace {

using Code = nb::dlpack::dtype_code;

struct Pair {
  Dtype ours;
  Code code;
  std::uint8_t bits;
};
constexpr Pair kPairs[] = {
    {Dtype::float64, Code::Float, 64},       {Dtype::float32, Code::Float, 32},
    {Dtype::float16, Code::Float, 16},       {Dtype::bfloat16, Code::Bfloat, 16},
    {Dtype::int64, Code::Int, 64},           {Dtype::int32, Code::Int, 32},
    {Dtype::uint8, Code::UInt, 8},           {Dtype::bfloat16, Code::UInt, 16},
    {Dtype::uint8, Code::Bool, 8},           {Dtype::float8_e4m3, Code::Float8_E4M3FN, 8},
    {Dtype::ue8m0, Code::Float8_E8M0FNU, 8},
};

std::string shape_text(const nb::ndarray<nb::ro>& array) {
  std::string text = "[";
  for (std::size_t d = 0; d < array.ndim(); ++d) text += fmt::format("{}{}", d == 0 ? "" : ", ", array.shape(d));
  return text + "]";
}

Dtype dtype_of(const nb::ndarray<nb::ro>& array, const std::optional<std::string>& wanted) {
  const nb::dlpack::dtype& given = array.dtype();
  if (wanted) {
    const Dtype dtype = parse_dtype(*wanted);
    if (size_of(dtype) * 8 != given.bits)
      usage_error("an array of {}-bit elements as dtype = {}, which has {} bits; view it as one of that size", given.bits, *wanted,
                  size_of(dtype) * 8);
    return dtype;
  }
  for (const Pair& pair : kPairs) {
    if (given.code == static_cast<std::uint8_t>(pair.code) && given.bits == pair.bits && given.lanes == 1) return pair.ours;
  }
  usage_error(
      "an array {} of DLPack type {} with {} bits; expected float64, float32, float16, bfloat16 (or uint16 bits of it), int64, int32 or "
      "uint8",
      shape_text(array), given.code, given.bits);
}

nb::dlpack::dtype dlpack_dtype(Dtype dtype, Framework framework) {
  if (dtype == Dtype::float8_e4m3 || dtype == Dtype::ue8m0) dtype = Dtype::uint8;
  const Code two_bytes = framework == Framework::numpy ? Code::UInt : Code::Bfloat;
  if (dtype == Dtype::bfloat16) return {static_cast<std::uint8_t>(two_bytes), 16, 1};
  for (const Pair& pair : kPairs) {
    if (pair.ours == dtype) return {static_cast<std::uint8_t>(pair.code), pair.bits, 1};
  }
  usage_error("{} has no place in an array", name(dtype));
}

nb::object owner_capsule(std::shared_ptr<void> owner) {
  auto* held = new std::shared_ptr<void>(std::move(owner));
  return nb::capsule(held, [](void* pointer) noexcept { delete static_cast<std::shared_ptr<void>*>(pointer); });
}

template <class Numpy, class Torch, class View>
nb::object export_as(const View& view, std::shared_ptr<void> owner, const Place& place) {
  if (!view) return nb::none();
  std::array<std::size_t, 4> shape{};
  for (int d = 0; d < view.ndim; ++d) shape[d] = static_cast<std::size_t>(view.shape[d]);
  const int device_type = place.device == Device::cuda ? nb::device::cuda::value : nb::device::cpu::value;
  static std::byte nothing[16];  // empty arrays point somewhere, too
  auto* data = const_cast<void*>(static_cast<const void*>(view.data != nullptr ? view.data : nothing));
  auto make = [&](auto array) { return nb::cast(array, nb::rv_policy::reference); };
  const nb::object capsule = owner_capsule(std::move(owner));
  const auto dtype = dlpack_dtype(view.dtype, place.framework);
  if (place.framework == Framework::numpy)
    return make(Numpy(data, view.ndim, shape.data(), capsule, view.strides.data(), dtype, device_type, place.device_index));
  return make(Torch(data, view.ndim, shape.data(), capsule, view.strides.data(), dtype, device_type, place.device_index));
}

}  // namespace

Tensor::Tensor(const nb::ndarray<nb::ro>& array, const std::optional<std::string>& dtype) : array_(array) {
  if (array.ndim() < 1 || array.ndim() > ConstTensorView::kMaxDims) {
    usage_error("an array {} of {} dimensions; expected 1 to {}", shape_text(array), array.ndim(), ConstTensorView::kMaxDims);
  }
  view_.data = array.data();
  view_.dtype = dtype_of(array, dtype);
  view_.ndim = static_cast<int>(array.ndim());
  for (int d = 0; d < view_.ndim; ++d) {
    view_.shape[d] = static_cast<std::int64_t>(array.shape(d));
    view_.strides[d] = array.stride(d);
  }
  if (array.size() != 0) return;
  for (std::int64_t d = view_.ndim - 1, stride = 1; d >= 0; --d) {  // an empty array may say anything
    view_.strides[d] = stride;
    stride *= view_.shape[d];
  }
}

TensorView Tensor::writable() const {
  TensorView view;
  view.data = const_cast<void*>(view_.data);
  view.dtype = view_.dtype;
  view.ndim = view_.ndim;
  view.shape = view_.shape;
  view.strides = view_.strides;
  return view;
}

nb::object export_array(const TensorView& view, std::shared_ptr<void> owner, const Place& place) {
  return export_as<nb::ndarray<nb::numpy>, nb::ndarray<nb::pytorch>>(view, std::move(owner), place);
}

nb::object export_array(const ConstTensorView& view, std::shared_ptr<void> owner, const Place& place) {
  // torch knows no read-only tensors.
  return export_as<nb::ndarray<nb::numpy, nb::ro>, nb::ndarray<nb::pytorch>>(view, std::move(owner), place);
}

void bind_arrays(nb::module_& m) {
  nb::enum_<Framework>(m, "Framework").value("numpy", Framework::numpy).value("torch", Framework::torch);
  nb::class_<Place>(m, "Place", "Whose arrays come out, and in which memory.")
      .def(
          "__init__",
          [](Place* self, Framework framework, const std::string& device, int device_index) {
            new (self) Place{framework, parse_device(device), device_index};
          },
          nb::arg("framework"), nb::arg("device") = "cpu", nb::arg("device_index") = 0);
  nb::class_<Tensor>(m, "Tensor", "A view of an array, which it keeps alive.")
      .def(nb::init<const nb::ndarray<nb::ro>&, const std::optional<std::string>&>(), nb::arg("array"), nb::arg("dtype") = nb::none())
      .def_prop_ro("dtype", [](const Tensor& self) { return name(self.view().dtype); })
      .def("__repr__", [](const Tensor& self) { return describe(self.view()); });
  m.def(
      "size_of", [](const std::string& dtype) { return size_of(parse_dtype(dtype)); }, nb::arg("dtype"), "Bytes of one element.");
}

}  // namespace tokenyard::python
