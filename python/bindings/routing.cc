#include "tokenyard/routing.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
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

using Shared = std::shared_ptr<Routing>;

// (topk_ids, topk_weights, load), which keep the routing alive.
nb::object arrays_of(const Shared& routing, const Place& place) {
  auto array = [&](void* data, Dtype dtype, std::initializer_list<std::int64_t> shape) {
    return export_array(TensorView(data, dtype, shape), routing, place);
  };
  const std::int64_t tokens = routing->num_tokens();
  return nb::make_tuple(array(routing->topk_ids.data(), Dtype::int64, {tokens, routing->top_k}),
                        array(routing->topk_weights.data(), Dtype::float32, {tokens, routing->top_k}),
                        array(routing->load.data(), Dtype::int64, {static_cast<std::int64_t>(routing->load.size())}));
}

void bind_gradients(nb::module_& m) {
  nb::class_<GateStatistics>(m, "GateStatistics", "What the balancing and z losses need of a batch, or of several together.")
      .def(
          "__init__",
          [](GateStatistics* self, std::vector<std::int64_t> load, std::vector<double> score_sums, double squared_log_sum_exps,
             std::int64_t num_tokens) {
            new (self) GateStatistics{std::move(load), std::move(score_sums), squared_log_sum_exps, num_tokens};
          },
          nb::arg("load"), nb::arg("score_sums"), nb::arg("squared_log_sum_exps"), nb::arg("num_tokens"))
      .def("add", &GateStatistics::add, nb::arg("other"))
      .def_ro("squared_log_sum_exps", &GateStatistics::squared_log_sum_exps)
      .def_ro("load", &GateStatistics::load)
      .def_ro("score_sums", &GateStatistics::score_sums)
      .def_ro("num_tokens", &GateStatistics::num_tokens);
  m.def(
      "gate_statistics",
      [](const RoutingInput& input, const Gate& gate, const Shared& routing) { return gate_statistics(input, gate, *routing); },
      nb::arg("input"), nb::arg("gate"), nb::arg("routing"));
  m.def("balance_loss", &balance_loss, nb::arg("statistics"), nb::arg("alpha"));
  m.def("z_loss", &z_loss, nb::arg("statistics"), nb::arg("alpha"));
  m.def(
      "add_weights_gradient",
      [](const RoutingInput& input, const Gate& gate, const Shared& routing, const Tensor& d_weights, const Tensor& d_logits) {
        add_weights_gradient(input, gate, *routing, d_weights.view(), d_logits.writable());
      },
      nb::arg("input"), nb::arg("gate"), nb::arg("routing"), nb::arg("d_weights"), nb::arg("d_logits"));
  m.def(
      "add_balance_gradient",
      [](const RoutingInput& input, const Gate& gate, const GateStatistics& statistics, double alpha, const Tensor& d_logits) {
        add_balance_gradient(input, gate, statistics, alpha, d_logits.writable());
      },
      nb::arg("input"), nb::arg("gate"), nb::arg("statistics"), nb::arg("alpha"), nb::arg("d_logits"));
  m.def(
      "add_z_gradient",
      [](const RoutingInput& input, const Gate& gate, const GateStatistics& statistics, double alpha, const Tensor& d_logits) {
        add_z_gradient(input, gate, statistics, alpha, d_logits.writable());
      },
      nb::arg("input"), nb::arg("gate"), nb::arg("statistics"), nb::arg("alpha"), nb::arg("d_logits"));
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
  nb::class_<Routing>(m, "Routing").def("arrays", arrays_of, nb::arg("place"));
  m.def(
      "route",
      [](const RoutingInput& input, const Gate& gate) { return std::make_shared<Routing>(waiting([&] { return route(input, gate); })); },
      nb::arg("input"), nb::arg("gate"));
  bind_gradients(m);
}

}  // namespace tokenyard::python
