#include "tokenyard/device_experts.h"

#include <nanobind/stl/string.h>

#include "experts.h"

namespace tokenyard::python {
namespace {

void* as_stream(std::uintptr_t stream) { return reinterpret_cast<void*>(stream); }

void make_groups(DeviceRowGroups* self, std::int64_t places, const Tensor& counts, const Tensor* begins, std::int64_t capacity,
                 const Tensor* rows) {
  new (self) DeviceRowGroups{places, counts.view(), view_or_none(begins), capacity, view_or_none(rows)};
}

void bind_products(nb::class_<DeviceExperts>& experts) {
  experts
      .def(
          "grouped_gemm",
          [](DeviceExperts& self, const Tensors& in, const DeviceRowGroups& groups, const Tensor& y, std::uintptr_t stream) {
            self.grouped_gemm(in.at(0)->view(), groups, in.at(1)->view(), view_or_none(in.at(2)), y.writable(), as_stream(stream));
          },
          nb::arg("x_w_bias"), nb::arg("groups"), nb::arg("y"), nb::arg("stream"))
      .def(
          "grouped_gemm_scaled",
          [](DeviceExperts& self, const Tensors& in, const DeviceRowGroups& groups, const Tensor& y, std::uintptr_t stream) {
            self.grouped_gemm_scaled({in.at(0)->view(), in.at(1)->view()}, groups, {in.at(2)->view(), in.at(3)->view()},
                                     view_or_none(in.at(4)), y.writable(), as_stream(stream));
          },
          nb::arg("x_scales_w_scales_bias"), nb::arg("groups"), nb::arg("y"), nb::arg("stream"))
      .def(
          "grouped_gemm_dgrad",
          [](DeviceExperts& self, const Tensors& in, const DeviceRowGroups& groups, const Tensor& dx, std::uintptr_t stream) {
            self.grouped_gemm_dgrad(in.at(0)->view(), groups, in.at(1)->view(), dx.writable(), as_stream(stream));
          },
          nb::arg("dy_w"), nb::arg("groups"), nb::arg("dx"), nb::arg("stream"))
      .def(
          "grouped_gemm_wgrad",
          [](DeviceExperts& self, const Tensors& in, const DeviceRowGroups& groups, const Tensor& dw, std::uintptr_t stream) {
            self.grouped_gemm_wgrad(in.at(0)->view(), in.at(1)->view(), groups, dw.writable(), as_stream(stream));
          },
          nb::arg("dy_x"), nb::arg("groups"), nb::arg("dw"), nb::arg("stream"))
      .def(
          "clear_padding",
          [](DeviceExperts& self, const DeviceRowGroups& groups, const Tensor& rows, std::uintptr_t stream) {
            self.clear_padding(groups, rows.writable(), as_stream(stream));
          },
          nb::arg("groups"), nb::arg("rows"), nb::arg("stream"))
      .def(
          "unpermute",
          [](DeviceExperts& self, const Tensors& in, const DeviceRowGroups& groups, const Tensor& out, std::uintptr_t stream) {
            self.unpermute(fold_input(*in.at(0), *in.at(1), in.at(2)), groups, out.writable(), as_stream(stream));
          },
          nb::arg("places_ids_weights"), nb::arg("groups"), nb::arg("out"), nb::arg("stream"));
}

void forward(DeviceExperts& self, const FeedForward& what, const Tensors& rows, const DeviceRowGroups& groups, std::uintptr_t stream) {
  self.experts_forward({.x = rows.at(0)->view(), .gate_up = writable_or_none(rows.at(2)), .x_scales = view_or_none(rows.at(3))}, groups,
                       what.weights, what.activation, rows.at(1)->writable(), as_stream(stream));
}

void backward(DeviceExperts& self, const FeedForward& what, const Tensors& rows, const DeviceRowGroups& groups, const Tensors& gradients,
              std::uintptr_t stream) {
  self.experts_backward({.x = rows.at(0)->view(),
                         .gate_up = rows.at(1)->view(),
                         .dy = rows.at(2)->view(),
                         .dx = rows.at(3)->writable(),
                         .gradients = expert_gradients(gradients, 0)},
                        groups, what.weights, what.activation, as_stream(stream));
}

}  // namespace

void bind_device_experts(nb::module_& m) {
  nb::class_<DeviceRowGroups>(m, "DeviceRowGroups", "Views only: the caller keeps the tables.")
      .def("__init__", make_groups, nb::arg("places"), nb::arg("counts"), nb::arg("begins").none(), nb::arg("capacity"),
           nb::arg("rows").none())
      .def_rw("likely", &DeviceRowGroups::likely);
  m.def(
      "likely_places", [](const Received& received) { return DeviceRowGroups::of(received).likely; }, nb::arg("received"));
  nb::class_<DeviceExperts> experts(m, "DeviceExperts");
  experts.def(
      "__init__", [](DeviceExperts* self, int device) { new (self) DeviceExperts(DeviceExpertsOptions{.device = device}); },
      nb::arg("device"));
  bind_products(experts);
  experts.def("forward", forward, nb::arg("feed_forward"), nb::arg("x_y_gate_up_scales"), nb::arg("groups"), nb::arg("stream"))
      .def("backward", backward, nb::arg("feed_forward"), nb::arg("x_gate_up_dy_dx"), nb::arg("groups"), nb::arg("gradients"),
           nb::arg("stream"));
}

}  // namespace tokenyard::python
