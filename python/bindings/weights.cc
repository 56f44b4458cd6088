#include "tokenyard/weights.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "collectives.h"
#include "core/usage.h"

namespace tokenyard::python {
namespace {

ExpertTensor parse_expert_tensor(const std::string& text) {
  for (const ExpertTensor tensor : {ExpertTensor::w13, ExpertTensor::w2, ExpertTensor::w13_bias, ExpertTensor::w2_bias,
                                    ExpertTensor::w13_scale, ExpertTensor::w2_scale}) {
    if (name(tensor) == text) return tensor;
  }
  usage_error("tensor {}; expected w13, w2, w13_bias, w2_bias, w13_scale or w2_scale", text);
}

Distribution parse_distribution(const std::string& text) {
  if (text == "normal") return Distribution::normal;
  if (text == "uniform") return Distribution::uniform;
  usage_error("distribution {}; expected normal or uniform", text);
}

nb::object indices(const ShardMap& self, const Place& place) {
  auto held = std::make_shared<std::vector<std::int64_t>>();
  held->reserve(static_cast<std::size_t>(self.local_elements()));
  for (const Run& run : self.runs()) {
    for (std::int64_t i = 0; i < run.length; ++i) held->push_back(run.global_offset + i);
  }
  return export_array(TensorView(held->data(), Dtype::int64, {std::ssize(*held)}), held, place);
}

ShardMap of_ranges(std::int64_t global_elements, const std::vector<std::pair<std::int64_t, std::int64_t>>& ranges) {
  std::vector<Run> runs;
  for (const auto& [offset, length] : ranges) runs.push_back({.global_offset = offset, .local_offset = 0, .length = length});
  return ShardMap::of_ranges(global_elements, runs);
}

void bind_maps(nb::module_& m) {
  nb::class_<Run>(m, "Run", "Elements [global_offset, global_offset + length) of the full tensor are [local_offset, ...) of the shard.")
      .def_ro("global_offset", &Run::global_offset)
      .def_ro("local_offset", &Run::local_offset)
      .def_ro("length", &Run::length)
      .def("__repr__", [](const Run& self) { return fmt::format("Run({}, {}, {})", self.global_offset, self.local_offset, self.length); });
  nb::class_<ShardMap>(m, "ShardMap",
                       "The elements of a full tensor that a rank holds, densely, in the order of its runs. Parameters, gradients and\n"
                       "optimizer state of one shape have one map. Immutable.")
      .def_static("whole", &ShardMap::whole, nb::arg("global_elements"), "All of a tensor.")
      .def_static("of_ranges", of_ranges, nb::arg("global_elements"), nb::arg("ranges"),
                  "From (global offset, length) in local order; neighbours are merged. UsageError where they overlap or leave the tensor.")
      .def("part", &ShardMap::part, nb::arg("parts"), nb::arg("index"), nb::arg("unit") = 1,
           "The index-th of even parts of this shard, cut between units of `unit` elements: FSDP's further cut.")
      .def_prop_ro("global_elements", &ShardMap::global_elements, "Of the full tensor.")
      .def_prop_ro("local_elements", &ShardMap::local_elements, "Of this shard.")
      .def_prop_ro(
          "runs", [](const ShardMap& self) { return std::vector<Run>(self.runs().begin(), self.runs().end()); },
          "Ascending, with dense local offsets.")
      .def("_indices", indices, nb::arg("place"))
      .def(
          "__eq__", [](const ShardMap& self, const ShardMap& other) { return self == other; }, nb::arg("other"))
      .def("__repr__", [](const ShardMap& self) {
        return fmt::format("<ShardMap of {} elements of {}, {} runs>", self.local_elements(), self.global_elements(), self.runs().size());
      });
  nb::class_<Transfer>(m, "Transfer", "A piece of a shard that travels, or stays, when one set of shards becomes another.")
      .def_ro("from_rank", &Transfer::from_rank)
      .def_ro("from_offset", &Transfer::from_offset)
      .def_ro("to_rank", &Transfer::to_rank)
      .def_ro("to_offset", &Transfer::to_offset)
      .def_ro("length", &Transfer::length);
}

void bind_expert_shards(nb::module_& m) {
  nb::class_<ExpertShape>(m, "ExpertShape", "Sizes of a layer's experts; scale_block: rows and columns that share one scale.")
      .def(
          "__init__",
          [](ExpertShape* self, int num_experts, std::int64_t hidden_size, std::int64_t expert_width, std::int64_t scale_block) {
            new (self) ExpertShape{num_experts, hidden_size, expert_width, scale_block};
          },
          nb::arg("num_experts"), nb::arg("hidden_size"), nb::arg("expert_width"), nb::arg("scale_block") = 128)
      .def_ro("num_experts", &ExpertShape::num_experts)
      .def_ro("hidden_size", &ExpertShape::hidden_size)
      .def_ro("expert_width", &ExpertShape::expert_width)
      .def_ro("scale_block", &ExpertShape::scale_block);
  m.def(
      "full_shape", [](const std::string& tensor, const ExpertShape& shape) { return full_shape(parse_expert_tensor(tensor), shape); },
      nb::arg("tensor"), nb::arg("shape"));
  m.def(
      "expert_shard",
      [](const std::string& tensor, const ExpertShape& shape, const Placement& placement, int rank) {
        return expert_shard(parse_expert_tensor(tensor), shape, placement, rank);
      },
      nb::arg("tensor"), nb::arg("shape"), nb::arg("placement"), nb::arg("rank"));
}

using Maps = std::vector<ShardMap>;

void bind_movement(nb::module_& m) {
  m.def(
      "reshard_plan", [](const Maps& before, const Maps& after) { return reshard_plan(before, after); }, nb::arg("before"),
      nb::arg("after"));
  m.def(
      "reshard",
      [](HeldCollectives& held, const Maps& before, const Maps& after, const Tensor& in, const Tensor& out) {
        waiting([&] { reshard(*held.collectives, before, after, in.view(), out.writable()); });
      },
      nb::arg("collectives"), nb::arg("before"), nb::arg("after"), nb::arg("input"), nb::arg("out"));
  m.def(
      "gather_full",
      [](HeldCollectives& held, const Maps& maps, const Tensor& in, int root, const Tensor* out) {
        waiting([&] { gather_full(*held.collectives, maps, in.view(), root, out != nullptr ? out->writable() : TensorView{}); });
      },
      nb::arg("collectives"), nb::arg("maps"), nb::arg("input"), nb::arg("root"), nb::arg("out").none());
  m.def(
      "initialise",
      [](const std::string& tensor, const std::string& distribution, float scale, std::uint64_t seed, const ShardMap& map,
         const Tensor& out) { waiting([&] {
                                initialise(tensor, {parse_distribution(distribution), scale, seed}, map, out.writable());
                              }); },
      nb::arg("name"), nb::arg("distribution"), nb::arg("scale"), nb::arg("seed"), nb::arg("map"), nb::arg("out"));
}

std::vector<std::string> names_of(const ExpertSource& self) {
  std::vector<std::string> names;
  for (const TensorPlan& plan : tensor_plans(self, Dtype::float32)) names.push_back(plan.name);
  return names;
}

void bind_sources(nb::module_& m) {
  nb::class_<ExpertSource>(m, "ExpertSource", "Where the elements of a full expert tensor are in a checkpoint.")
      .def_prop_ro("tensor", [](const ExpertSource& self) { return name(self.tensor); })
      .def_prop_ro("names", names_of, "Of the checkpoint's tensors, in the order of their blocks.")
      .def(
          "plans", [](const ExpertSource& self, const std::string& dtype) { return tensor_plans(self, parse_dtype(dtype)); },
          nb::arg("dtype"), "What a file with these tensors has to plan for.");
  m.def(
      "family_name", [](const std::string& text) { return name(parse_model_family(text)); }, nb::arg("text"));
  m.def(
      "expert_source",
      [](const std::string& family, int layer, const std::string& tensor, const ExpertShape& shape) {
        return expert_source(parse_model_family(family), layer, parse_expert_tensor(tensor), shape);
      },
      nb::arg("family"), nb::arg("layer"), nb::arg("tensor"), nb::arg("shape"));
  m.def(
      "shared_expert_source",
      [](const std::string& family, int layer, const std::string& tensor, const ExpertShape& shape) {
        return shared_expert_source(parse_model_family(family), layer, parse_expert_tensor(tensor), shape);
      },
      nb::arg("family"), nb::arg("layer"), nb::arg("tensor"), nb::arg("shape"));
  m.def(
      "dense_layer_source",
      [](const std::string& family, int layer, const std::string& tensor, const ExpertShape& shape) {
        return dense_layer_source(parse_model_family(family), layer, parse_expert_tensor(tensor), shape);
      },
      nb::arg("family"), nb::arg("layer"), nb::arg("tensor"), nb::arg("shape"));
  m.def(
      "gate_source",
      [](const std::string& family, int layer) {
        const GateSource source = gate_source(parse_model_family(family), layer);
        return nb::make_tuple(source.weight, source.bias);
      },
      nb::arg("family"), nb::arg("layer"));
  m.def(
      "source_dtype", [](const Checkpoint& checkpoint, const ExpertSource& source) { return name(source_dtype(checkpoint, source)); },
      nb::arg("checkpoint"), nb::arg("source"));
  m.def(
      "load_shard",
      [](const Checkpoint& checkpoint, const ExpertSource& source, const ShardMap& map, const Tensor& out) {
        waiting([&] { load_shard(checkpoint, source, map, out.writable()); });
      },
      nb::arg("checkpoint"), nb::arg("source"), nb::arg("map"), nb::arg("out"));
  m.def(
      "save_full",
      [](SafetensorsWriter& writer, const ExpertSource& source, const Tensor& full) {
        waiting([&] { save_full(writer, source, full.view()); });
      },
      nb::arg("writer"), nb::arg("source"), nb::arg("full"));
}

}  // namespace

void bind_weights(nb::module_& m) {
  bind_maps(m);
  bind_expert_shards(m);
  bind_movement(m);
  bind_sources(m);
}

}  // namespace tokenyard::python
