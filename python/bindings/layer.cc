#include "tokenyard/layer.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include "experts.h"
#include "layer/steps.h"
#include "world.h"

namespace tokenyard::python {
namespace {

// Layers hold their group, too: whoever lets go of it last does so without the GIL.
using HeldGroup = WithoutGil<std::shared_ptr<ExpertGroup>>;
using HeldLayer = WithoutGil<MoeLayer>;

void* as_stream(std::uintptr_t stream) { return reinterpret_cast<void*>(stream); }  // NOLINT(performance-no-int-to-ptr): as torch gives it

void make_group(HeldGroup* self, const RankWorld& world, const ParallelConfig& config, const ExpertGroupOptions& options) {
  const World mine = world.world();
  new (self) HeldGroup(
      waiting([&] { return std::make_unique<std::shared_ptr<ExpertGroup>>(std::make_shared<ExpertGroup>(mine, config, options)); }));
}

void bind_group_options(nb::module_& m) {
  nb::class_<ExpertGroupOptions>(m, "ExpertGroupOptions")
      .def(nb::init<>())
      .def_rw("num_experts", &ExpertGroupOptions::num_experts)
      .def_rw("top_k", &ExpertGroupOptions::top_k)
      .def_rw("hidden_size", &ExpertGroupOptions::hidden_size)
      .def_prop_rw(
          "dtype", [](const ExpertGroupOptions& self) { return std::string(name(self.dtype)); },
          [](ExpertGroupOptions& self, const std::string& text) { self.dtype = parse_dtype(text); })
      .def_rw("max_tokens_per_rank", &ExpertGroupOptions::max_tokens_per_rank)
      .def_prop_rw(
          "expert_tp", [](const ExpertGroupOptions& self) { return std::string(name(self.expert_tp)); },
          [](ExpertGroupOptions& self, const std::string& text) { self.expert_tp = parse_expert_tp(text); })
      .def_rw("same_tokens", &ExpertGroupOptions::same_tokens)
      .def_rw("dense_tp", &ExpertGroupOptions::dense_tp)
      .def_rw("max_local_experts", &ExpertGroupOptions::max_local_experts)
      .def_rw("receive_rows", &ExpertGroupOptions::receive_rows)
      .def_rw("depth", &ExpertGroupOptions::depth)
      .def_rw("num_threads", &ExpertGroupOptions::num_threads)
      .def_rw("trace", &ExpertGroupOptions::trace)
      .def_prop_rw(
          "transport", [](const ExpertGroupOptions& self) { return std::string(name(self.transport)); },
          [](ExpertGroupOptions& self, const std::string& text) { self.transport = parse_transport(text); })
      .def_rw("timeout_ms", &ExpertGroupOptions::timeout_ms)
      .def_prop_rw(
          "device", [](const ExpertGroupOptions& self) { return std::string(name(self.device)); },
          [](ExpertGroupOptions& self, const std::string& text) { self.device = parse_device(text); })
      .def_rw("device_index", &ExpertGroupOptions::device_index)
      .def_rw("sm_budget", &ExpertGroupOptions::sm_budget)
      .def_rw("gradients", &ExpertGroupOptions::gradients)
      .def_rw("max_expert_rows", &ExpertGroupOptions::max_expert_rows);
}

void bind_group(nb::module_& m) {
  nb::class_<HeldGroup>(m, "ExpertGroup")
      .def("__init__", make_group, nb::arg("world"), nb::arg("config"), nb::arg("options"))
      .def("options", [](const HeldGroup& self) { return (*self)->options(); })
      .def("world", [](const HeldGroup& self) { return RankWorld((*self)->world()); })
      .def_prop_ro("ep_rank", [](const HeldGroup& self) { return (*self)->ep_rank(); })
      .def_prop_ro("tp_rank", [](const HeldGroup& self) { return (*self)->tp_rank(); })
      .def_prop_ro("dense_rank", [](const HeldGroup& self) { return (*self)->dense_rank(); })
      .def_prop_ro("has_exchange", [](const HeldGroup& self) { return (*self)->exchange() != nullptr; })
      .def(
          "placement", [](const HeldGroup& self, int num_experts) { return (*self)->placement(num_experts); }, nb::arg("num_experts"))
      .def("check", [](HeldGroup& self) { (*self)->check(); })
      .def("take_spans", [](HeldGroup& self) { return (*self)->take_spans(); });
}

// In the order of tokenyard.layer.MoeWeights.
constexpr std::size_t kExperts = 3, kShared = 7, kSharedGate = 11, kScales = 12;

MoeWeights moe_weights(const Tensors& tensors) {
  MoeWeights weights = {.gate = {view_or_none(tensors.at(0)), view_or_none(tensors.at(1)), view_or_none(tensors.at(2))},
                        .experts = expert_weights(tensors, kExperts),
                        .shared = {expert_weights(tensors, kShared), view_or_none(tensors.at(kSharedGate))}};
  weights.experts.w13_scale = view_or_none(tensors.at(kScales));
  weights.experts.w2_scale = view_or_none(tensors.at(kScales + 1));
  return weights;
}

MoeGradients moe_gradients(const Tensors& tensors) {
  return {.gate_weight = writable_or_none(tensors.at(0)),
          .gate_bias = writable_or_none(tensors.at(1)),
          .experts = expert_gradients(tensors, kExperts),
          .shared = {expert_gradients(tensors, kShared), writable_or_none(tensors.at(kSharedGate))}};
}

nb::object routing_arrays(const nb::object& self, const Place& place) {
  const Routing& routing = nb::cast<MoeActivations&>(self).routing();
  const auto owner = std::make_shared<Routing>(routing);  // a copy: the next forward with these activations writes there
  const auto num_experts = static_cast<std::int64_t>(owner->load.size());
  return nb::make_tuple(export_array(owner->ids_view(), owner, place), export_array(owner->weights_view(), owner, place),
                        export_array(ConstTensorView(owner->load.data(), Dtype::int64, {num_experts}), owner, place));
}

void copy_logits(const MoeActivations& self, const Tensor& out) {
  const ConstTensorView logits = self.logits();
  std::copy_n(logits.as<float>(), logits.num_elements(), out.writable().as<float>());
}

// Of a step on a GPU, where they stay: the next forward with these activations writes there.
nb::object device_logits(const MoeActivations& self, const Place& place) {
  return export_array(self.logits(), std::static_pointer_cast<void>(self.step().on_gpu), place);
}

void bind_step(nb::module_& m) {
  nb::class_<MoeActivations>(m, "MoeActivations")
      .def(nb::init<>())
      .def("routing", routing_arrays, nb::arg("place"))
      .def("device_logits", device_logits, nb::arg("place"))
      .def("copy_logits", copy_logits, nb::arg("out"));
  nb::class_<MoeStepOptions>(m, "MoeStepOptions", "Views only: the caller keeps the tensors.")
      .def(
          "__init__",
          [](MoeStepOptions* self, const std::string& mode, const Tensors& mask_ids_logits, bool sliced_out, std::uintptr_t stream) {
            new (self) MoeStepOptions{parse_mode(mode), view_or_none(mask_ids_logits.at(0)),     view_or_none(mask_ids_logits.at(1)),
                                      sliced_out,       writable_or_none(mask_ids_logits.at(2)), as_stream(stream)};
          },
          nb::arg("mode"), nb::arg("mask_ids_logits"), nb::arg("sliced_out"), nb::arg("stream"));
  m.def(
      "mode_for_step", [](std::int64_t tokens, std::int64_t latency_tokens) { return name(mode_for_step(tokens, latency_tokens)); },
      nb::arg("max_tokens_of_a_rank"), nb::arg("latency_tokens"));
}

void make_layer(HeldLayer* self, const HeldGroup& group, const Tensors& weights, const Gate& gate, const nb::tuple& activation,
                const std::optional<Placement>& placement) {
  const MoeWeights views = moe_weights(weights);
  const MoeLayerOptions options{.gate = gate, .activation = parse_activation(activation), .placement = placement};
  new (self) HeldLayer(waiting([&] { return std::make_unique<MoeLayer>(*group, views, options); }));
}

void backward(HeldLayer& self, const Tensors& rows, const MoeStepOptions& options, const MoeActivations& saved, const Tensor& d_x,
              const Tensors& gradients) {
  const MoeBackwardInput input{rows.at(0)->view(), rows.at(1)->view(), view_or_none(rows.at(2)), options};
  const MoeGradients into = moe_gradients(gradients);
  waiting([&] { self->backward(input, saved, d_x.writable(), into); });
}

using HeldDense = WithoutGil<DenseLayer>;

// tensors: w13, w2, w13_bias, w2_bias, gate
void make_dense(HeldDense* self, const HeldGroup* group, const Tensors& tensors, const nb::tuple& activation) {
  const DenseWeights weights{expert_weights(tensors, 0), view_or_none(tensors.at(4))};
  const Activation kind = parse_activation(activation);
  new (self) HeldDense(waiting([&] { return std::make_unique<DenseLayer>(group != nullptr ? **group : nullptr, weights, kind); }));
}

void bind_dense(nb::module_& m) {
  nb::class_<DenseActivations>(m, "DenseActivations").def(nb::init<>());
  nb::class_<HeldDense>(m, "DenseLayer", "Views only: the caller keeps the weights.")
      .def("__init__", make_dense, nb::arg("group").none(), nb::arg("weights"), nb::arg("activation"))
      .def(
          "forward",
          [](HeldDense& self, const Tensor& x, const Tensor& out, DenseActivations* saved, std::uintptr_t stream) {
            waiting([&] { self->forward(x.view(), out.writable(), saved, as_stream(stream)); });
          },
          nb::arg("x"), nb::arg("out"), nb::arg("saved").none(), nb::arg("stream"))
      .def(
          "backward",
          [](HeldDense& self, const Tensors& rows, const DenseActivations& saved, const Tensor& d_x, const Tensors& gradients,
             std::uintptr_t stream) {
            const DenseGradients into{expert_gradients(gradients, 0), writable_or_none(gradients.at(4))};
            waiting([&] { self->backward(rows.at(0)->view(), rows.at(1)->view(), saved, d_x.writable(), into, as_stream(stream)); });
          },
          nb::arg("x_d_out"), nb::arg("saved"), nb::arg("d_x"), nb::arg("gradients"), nb::arg("stream"));
}

}  // namespace

void bind_layer(nb::module_& m) {
  bind_group_options(m);
  bind_group(m);
  bind_step(m);
  bind_dense(m);
  nb::class_<HeldLayer>(m, "MoeLayer", "Views only: the caller keeps the weights.")
      .def("__init__", make_layer, nb::arg("group"), nb::arg("weights"), nb::arg("gate"), nb::arg("activation"),
           nb::arg("placement").none())
      .def(
          "forward",
          [](HeldLayer& self, const Tensor& x, const Tensor& out, const MoeStepOptions& options, MoeActivations* saved) {
            waiting([&] { self->forward(x.view(), out.writable(), options, saved); });
          },
          nb::arg("x"), nb::arg("out"), nb::arg("options"), nb::arg("saved").none())
      .def("backward", backward, nb::arg("rows"), nb::arg("options"), nb::arg("saved"), nb::arg("d_x"), nb::arg("gradients"))
      .def(
          "warm_up", [](HeldLayer& self, const std::vector<std::int64_t>& token_counts) { waiting([&] { self->warm_up(token_counts); }); },
          nb::arg("token_counts"));
}

}  // namespace tokenyard::python
