#include "experts.h"

#include <nanobind/stl/string.h>

#include "core/usage.h"

namespace tokenyard::python {
namespace {

nb::object list_as_array(const nb::object& self, const std::vector<std::int64_t>& values, const Place& place) {
  auto* owner = new nb::object(self);
  return export_array(ConstTensorView(values.data(), Dtype::int64, {std::ssize(values)}),
                      std::shared_ptr<void>(owner, [](void* held) { delete static_cast<nb::object*>(held); }), place);
}

void bind_groups(nb::module_& m) {
  nb::class_<RowGroups>(m, "RowGroups")
      .def_static("of", &RowGroups::of, nb::arg("received"), nb::arg("num_local_experts"))
      .def_static(
          "of_offsets", [](const Tensor& counts, const Tensor& offsets) { return RowGroups::of_offsets(counts.view(), offsets.view()); },
          nb::arg("counts"), nb::arg("offsets"))
      .def_static(
          "padded", [](const Tensor& counts, std::int64_t capacity) { return RowGroups::padded(counts.view(), capacity); },
          nb::arg("counts"), nb::arg("capacity"))
      .def_static(
          "gathered",
          [](const Tensor& local_ids, int num_local_experts) { return RowGroups::gathered(local_ids.view(), num_local_experts); },
          nb::arg("local_ids"), nb::arg("num_local_experts"))
      .def_ro("places", &RowGroups::places)
      .def_ro("begins", &RowGroups::begins)
      .def_ro("counts", &RowGroups::counts)
      .def_prop_ro("is_gathered", [](const RowGroups& self) { return !self.rows.empty(); })
      .def(
          "rows", [](const nb::object& self, const Place& place) { return list_as_array(self, nb::cast<RowGroups&>(self).rows, place); },
          nb::arg("place"));
}

void bind_products(nb::module_& m) {
  m.def(
      "grouped_gemm",
      [](const Tensor& x, const RowGroups& groups, const Tensor& w, const Tensor* bias, const Tensor& y) {
        waiting([&] { grouped_gemm(x.view(), groups, w.view(), view_or_none(bias), y.writable()); });
      },
      nb::arg("x"), nb::arg("groups"), nb::arg("w"), nb::arg("bias").none(), nb::arg("y"));
  m.def(
      "grouped_gemm_dgrad",
      [](const Tensor& dy, const RowGroups& groups, const Tensor& w, const Tensor& dx) {
        waiting([&] { grouped_gemm_dgrad(dy.view(), groups, w.view(), dx.writable()); });
      },
      nb::arg("dy"), nb::arg("groups"), nb::arg("w"), nb::arg("dx"));
  m.def(
      "grouped_gemm_wgrad",
      [](const Tensor& dy, const Tensor& x, const RowGroups& groups, const Tensor& dw) {
        waiting([&] { grouped_gemm_wgrad(dy.view(), x.view(), groups, dw.writable()); });
      },
      nb::arg("dy"), nb::arg("x"), nb::arg("groups"), nb::arg("dw"));
}

void bind_permutation(nb::module_& m) {
  m.def(
      "permute",
      [](const Tensor& rows, const RowGroups& groups, const Tensor& out) {
        waiting([&] { permute(rows.view(), groups, out.writable()); });
      },
      nb::arg("rows"), nb::arg("groups"), nb::arg("out"));
  m.def(
      "unpermute",
      [](const Tensor& places, const Tensor& local_ids, const Tensor* row_weights, const RowGroups& groups, const Tensor& out) {
        waiting([&] { unpermute(fold_input(places, local_ids, row_weights), groups, out.writable()); });
      },
      nb::arg("places"), nb::arg("local_ids"), nb::arg("row_weights").none(), nb::arg("groups"), nb::arg("out"));
}

void make_feed_forward(FeedForward* self, const Tensors& weights, const nb::tuple& activation) {
  new (self) FeedForward{expert_weights(weights, 0), parse_activation(activation)};
  self->weights.w13_scale = view_or_none(weights.at(4));
  self->weights.w2_scale = view_or_none(weights.at(5));
}

void forward(const FeedForward& self, const Tensor& x, const RowGroups& groups, const Tensor& y, ExpertActivations* saved) {
  waiting([&] { experts_forward(x.view(), groups, self.weights, self.activation, y.writable(), saved); });
}

void bind_feed_forward(nb::module_& m) {
  nb::class_<ExpertActivations>(m, "ExpertActivations").def(nb::init<>());
  nb::class_<FeedForward>(m, "FeedForward", "Views only: the caller keeps the tensors.")
      .def("__init__", make_feed_forward, nb::arg("weights"), nb::arg("activation"))
      .def("forward", forward, nb::arg("x"), nb::arg("groups"), nb::arg("y"), nb::arg("saved").none())
      .def(
          "backward",
          [](const FeedForward& self, const Tensor& x, const Tensor& dy, const ExpertActivations& saved, const RowGroups& groups,
             const Tensor& dx, const Tensors& gradients) {
            const ExpertGradients into = expert_gradients(gradients, 0);
            waiting([&] { experts_backward({x.view(), dy.view(), &saved}, groups, self.weights, self.activation, dx.writable(), into); });
          },
          nb::arg("x"), nb::arg("dy"), nb::arg("saved"), nb::arg("groups"), nb::arg("dx"), nb::arg("gradients"));
}

}  // namespace

FoldInput fold_input(const Tensor& places, const Tensor& local_ids, const Tensor* row_weights) {
  return {.places = places.view(), .local_ids = local_ids.view(), .row_weights = view_or_none(row_weights)};
}

Activation parse_activation(const nb::tuple& activation) {
  const auto kind = nb::cast<std::string>(activation[0]);
  if (kind != "silu" && kind != "clamped") usage_error("activation {}; expected silu or clamped", kind);
  return {.kind = kind == "silu" ? ActivationKind::silu : ActivationKind::clamped,
          .limit = nb::cast<float>(activation[1]),
          .alpha = nb::cast<float>(activation[2])};
}

ExpertWeights expert_weights(const Tensors& tensors, std::size_t at) {
  return {view_or_none(tensors.at(at)), view_or_none(tensors.at(at + 1)), view_or_none(tensors.at(at + 2)),
          view_or_none(tensors.at(at + 3))};
}

ExpertGradients expert_gradients(const Tensors& tensors, std::size_t at) {
  return {writable_or_none(tensors.at(at)), writable_or_none(tensors.at(at + 1)), writable_or_none(tensors.at(at + 2)),
          writable_or_none(tensors.at(at + 3))};
}

void bind_experts(nb::module_& m) {
  bind_groups(m);
  bind_products(m);
  bind_permutation(m);
  bind_feed_forward(m);
}

}  // namespace tokenyard::python
