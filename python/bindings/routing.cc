#include "tokenyard/routing.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "core/usage.h"

namespace tokenyard::python {
namespace {

Score parse_score(const std::string& text) {
  if (text == "softmax") return Score::softmax;
  if (text == "sigmoid") return Score::sigmoid;
  usage_error("score = {}; expected softmax or sigmoid", text);
}

void bind_gate(nb::module_& m) {
  nb::class_<Gate>(m, "Gate", "How logits become top-k experts and weights; made by one of its functions.")
      .def_static("softmax", &Gate::softmax, nb::arg("top_k"), nb::arg("renormalise") = false, nb::arg("scale") = 1.0F)
      .def_static("sigmoid", &Gate::sigmoid, nb::arg("top_k"), nb::arg("renormalise") = false, nb::arg("scale") = 1.0F,
                  nb::arg("epsilon") = 0.0F)
      .def_static("grouped_max", &Gate::grouped_max, nb::arg("top_k"), nb::arg("num_groups"), nb::arg("topk_groups"),
                  nb::arg("renormalise") = false, nb::arg("scale") = 1.0F)
      .def_static(
          "bias_corrected",
          [](int top_k, const std::string& score, int num_groups, int topk_groups, bool renormalise, float scale) {
            return Gate::bias_corrected(top_k, parse_score(score), num_groups, topk_groups, renormalise, scale);
          },
          nb::arg("top_k"), nb::arg("score") = "sigmoid", nb::arg("num_groups") = 1, nb::arg("topk_groups") = 1,
          nb::arg("renormalise") = true, nb::arg("scale") = 1.0F)
      .def_static(
          "per_group",
          [](int top_k, int num_groups, const std::string& score, bool renormalise, float scale) {
            return Gate::per_group(top_k, num_groups, parse_score(score), renormalise, scale);
          },
          nb::arg("top_k"), nb::arg("num_groups"), nb::arg("score") = "softmax", nb::arg("renormalise") = false, nb::arg("scale") = 1.0F)
      .def_ro("top_k", &Gate::top_k)
      .def_ro("renormalise", &Gate::renormalise)
      .def_ro("epsilon", &Gate::epsilon)
      .def_ro("scale", &Gate::scale)
      .def_ro("num_groups", &Gate::num_groups)
      .def_ro("topk_groups", &Gate::topk_groups);
}

void bind_presets(nb::module_& m) {
  nb::class_<ModelPreset>(m, "ModelPreset", "A published model's MoE shape, from its configuration file.")
      .def_ro("name", &ModelPreset::name)
      .def_ro("num_experts", &ModelPreset::num_experts)
      .def_ro("top_k", &ModelPreset::top_k)
      .def_ro("hidden_size", &ModelPreset::hidden_size)
      .def_ro("expert_width", &ModelPreset::expert_width)
      .def_ro("shared_expert_width", &ModelPreset::shared_expert_width)
      .def_ro("gate", &ModelPreset::gate)
      .def_ro("has_gate_bias", &ModelPreset::has_gate_bias);
  m.def("model_presets", [] {
    const auto presets = model_presets();
    return std::vector<ModelPreset>(presets.begin(), presets.end());
  });
  m.def(
      "model_preset", [](const std::string& name) { return model_preset(name); }, nb::arg("name"));
}

nb::object route_arrays(const RoutingInput& input, const Gate& gate, const Place& place) {
  const auto routing = std::make_shared<Routing>(waiting([&] { return route(input, gate); }));
  auto array = [&](void* data, Dtype dtype, std::initializer_list<std::int64_t> shape) {
    return export_array(TensorView(data, dtype, shape), routing, place);
  };
  const std::int64_t tokens = input.logits.shape[0];
  return nb::make_tuple(array(routing->topk_ids.data(), Dtype::int64, {tokens, gate.top_k}),
                        array(routing->topk_weights.data(), Dtype::float32, {tokens, gate.top_k}),
                        array(routing->load.data(), Dtype::int64, {static_cast<std::int64_t>(routing->load.size())}));
}

ConstTensorView view_or_none(const Tensor* tensor) { return tensor != nullptr ? tensor->view() : ConstTensorView{}; }

}  // namespace

void bind_routing(nb::module_& m) {
  bind_gate(m);
  bind_presets(m);
  nb::class_<RoutingInput>(m, "RoutingInput")
      .def(
          "__init__",
          [](RoutingInput* self, const Tensor& logits, const Tensor* bias, const Tensor* mask, const Tensor* given_ids) {
            new (self) RoutingInput{logits.view(), view_or_none(bias), view_or_none(mask), view_or_none(given_ids)};
          },
          nb::arg("logits"), nb::arg("bias").none(), nb::arg("mask").none(), nb::arg("given_ids").none());
  m.def("route", route_arrays, nb::arg("input"), nb::arg("gate"), nb::arg("place"));
}

}  // namespace tokenyard::python
