#include "arrays.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <fmt/ranges.h>

#include <algorithm>
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

void check_size(Dtype dtype, std::int64_t bits) {
  if (size_of(dtype) * 8 == bits) return;
  usage_error("an array of {}-bit elements as dtype = {}, which has {} bits; view it as one of that size", bits, name(dtype),
              size_of(dtype) * 8);
}

Dtype dtype_of(const nb::ndarray<nb::ro>& array, const std::optional<std::string>& wanted) {
  const nb::dlpack::dtype& given = array.dtype();
  if (wanted) {
    check_size(parse_dtype(*wanted), given.bits);
    return parse_dtype(*wanted);
  }
  for (const Pair& pair : kPairs) {
    if (given.code == static_cast<std::uint8_t>(pair.code) && given.bits == pair.bits && given.lanes == 1) return pair.ours;
  }
  usage_error("an array of DLPack type {} with {} bits; expected float64, float32, float16, bfloat16, int64, int32 or uint8", given.code,
              given.bits);
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
  view_.data = array.data();
  view_.dtype = dtype_of(array, dtype);
  set_shape({array.shape_ptr(), array.ndim()}, {array.stride_ptr(), array.ndim()});
}

Tensor::Tensor(nb::object owner, const std::string& dtype, const Parts& parts) : owner_(std::move(owner)) {
  view_.data = reinterpret_cast<const void*>(parts.data);
  view_.dtype = parse_dtype(dtype);
  check_size(view_.dtype, parts.element_bytes * 8);
  constexpr std::size_t kMostDims = 64;  // torch has no more
  std::int64_t shape[kMostDims], strides[kMostDims];
  const std::size_t dims = std::min(parts.shape.size(), kMostDims);
  for (std::size_t d = 0; d < dims; ++d) {
    shape[d] = nb::cast<std::int64_t>(parts.shape[d]);
    strides[d] = nb::cast<std::int64_t>(parts.strides[d]);
  }
  set_shape({shape, dims}, {strides, dims});
}

void Tensor::set_shape(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides) {
  const int dims = static_cast<int>(shape.size());
  if (dims < 1 || dims > ConstTensorView::kMaxDims) {
    usage_error("an array [{}] of {} dimensions; expected 1 to {}", fmt::join(shape, ", "), dims, ConstTensorView::kMaxDims);
  }
  view_.ndim = dims;
  std::copy(shape.begin(), shape.end(), view_.shape.begin());
  std::copy(strides.begin(), strides.end(), view_.strides.begin());
  if (view_.num_elements() != 0) return;
  for (std::int64_t d = dims - 1, stride = 1; d >= 0; --d) {  // an empty array may say anything
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
      .def(
          "__init__",
          [](Tensor* self, nb::object owner, const std::string& dtype, std::uintptr_t data, std::int64_t element_bytes, nb::tuple shape,
             nb::tuple strides) {
            new (self) Tensor(std::move(owner), dtype, {data, element_bytes, std::move(shape), std::move(strides)});
          },
          nb::arg("owner"), nb::arg("dtype"), nb::arg("data"), nb::arg("element_bytes"), nb::arg("shape"), nb::arg("strides"))
      .def_prop_ro("dtype", [](const Tensor& self) { return name(self.view().dtype); })
      .def("__repr__", [](const Tensor& self) { return describe(self.view()); });
  m.def(
      "size_of", [](const std::string& dtype) { return size_of(parse_dtype(dtype)); }, nb::arg("dtype"), "Bytes of one element.");
}

}  // namespace tokenyard::python
