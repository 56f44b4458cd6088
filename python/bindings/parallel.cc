#include "tokenyard/parallel.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "core/usage.h"

namespace tokenyard::python {
namespace {

SubWorld parse_sub_world(const std::string& text) {
  for (const SubWorld kind : {SubWorld::attention, SubWorld::ep, SubWorld::tp, SubWorld::ep_tp, SubWorld::outer}) {
    if (name(kind) == text) return kind;
  }
  usage_error("sub-world {}; expected attention, ep, tp, ep_tp or outer", text);
}

void bind_coordinates(nb::module_& m) {
  nb::class_<RankCoordinates>(m, "RankCoordinates",
                              "Where a rank is: (outer, attn_dp, attn_tp, attn_cp) for attention, (outer, ep, mlp_tp) for the experts.")
      .def_ro("rank", &RankCoordinates::rank)
      .def_ro("node", &RankCoordinates::node)
      .def_ro("outer", &RankCoordinates::outer)
      .def_ro("attn_dp", &RankCoordinates::attn_dp)
      .def_ro("attn_tp", &RankCoordinates::attn_tp)
      .def_ro("attn_cp", &RankCoordinates::attn_cp)
      .def_ro("ep", &RankCoordinates::ep)
      .def_ro("mlp_tp", &RankCoordinates::mlp_tp)
      .def("__repr__", [](const RankCoordinates& self) {
        return fmt::format("RankCoordinates(rank={}, node={}, outer={}, attn_dp={}, attn_tp={}, attn_cp={}, ep={}, mlp_tp={})", self.rank,
                           self.node, self.outer, self.attn_dp, self.attn_tp, self.attn_cp, self.ep, self.mlp_tp);
      });
}

}  // namespace

void bind_parallel(nb::module_& m) {
  bind_coordinates(m);
  nb::class_<ParallelRequest>(m, "ParallelRequest")
      .def(nb::init<>())
      .def_rw("nnodes", &ParallelRequest::nnodes)
      .def_rw("device_count", &ParallelRequest::device_count)
      .def_rw("dp", &ParallelRequest::dp)
      .def_rw("tp", &ParallelRequest::tp)
      .def_rw("ep", &ParallelRequest::ep)
      .def_rw("cp", &ParallelRequest::cp)
      .def_rw("outer_dp", &ParallelRequest::outer_dp)
      .def_rw("attn_dp", &ParallelRequest::attn_dp)
      .def_rw("attn_tp", &ParallelRequest::attn_tp)
      .def_rw("attn_cp", &ParallelRequest::attn_cp)
      .def_rw("mlp_tp", &ParallelRequest::mlp_tp)
      .def_prop_rw(
          "transport", [](const ParallelRequest& self) { return std::string(name(self.transport)); },
          [](ParallelRequest& self, const std::string& text) { self.transport = parse_transport(text); });
  nb::class_<ParallelConfig>(m, "ParallelConfig")
      .def(nb::init<>())
      .def_rw("nnodes", &ParallelConfig::nnodes)
      .def_rw("device_count", &ParallelConfig::device_count)
      .def_rw("dp", &ParallelConfig::dp)
      .def_rw("tp", &ParallelConfig::tp)
      .def_rw("ep", &ParallelConfig::ep)
      .def_rw("cp", &ParallelConfig::cp)
      .def_rw("outer_dp", &ParallelConfig::outer_dp)
      .def_rw("attn_dp", &ParallelConfig::attn_dp)
      .def_rw("attn_tp", &ParallelConfig::attn_tp)
      .def_rw("attn_cp", &ParallelConfig::attn_cp)
      .def_rw("mlp_tp", &ParallelConfig::mlp_tp)
      .def("coordinates", &ParallelConfig::coordinates, nb::arg("rank"))
      .def(
          "split_arguments",
          [](const ParallelConfig& self, const std::string& kind, int rank) {
            const SplitArguments split = self.split_arguments(parse_sub_world(kind), rank);
            return std::pair(split.color, split.key);
          },
          nb::arg("kind"), nb::arg("rank"))
      .def(
          "sub_world_size", [](const ParallelConfig& self, const std::string& kind) { return self.sub_world_size(parse_sub_world(kind)); },
          nb::arg("kind"))
      .def("to_json", &ParallelConfig::to_json);
  m.def("solve_parallel", &solve_parallel, nb::arg("request"));
  m.def("check_parallel", &check_parallel, nb::arg("config"));
}

}  // namespace tokenyard::python
