#include "tokenyard/placement.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"

namespace tokenyard::python {
namespace {

std::vector<int> to_list(std::span<const int> values) { return {values.begin(), values.end()}; }

void bind_parts(nb::module_& m) {
  nb::class_<Replica>(m, "Replica", "One copy of an expert: the ranks of its TP shards in order, and its share of the expert's tokens.")
      .def(
          "__init__",
          [](Replica* self, std::vector<int> shard_ranks, std::uint32_t share) {
            new (self) Replica{std::move(shard_ranks), share};
          },
          nb::arg("shard_ranks"), nb::arg("share") = 1)
      .def_ro("shard_ranks", &Replica::shard_ranks)
      .def_ro("share", &Replica::share)
      .def("__repr__",
           [](const nb::object& self) { return nb::str("Replica({}, share={})").format(self.attr("shard_ranks"), self.attr("share")); });
  nb::class_<Instance>(m, "Instance", "One shard of one replica of an expert, where it is.")
      .def_ro("expert", &Instance::expert)
      .def_ro("replica", &Instance::replica)
      .def_ro("shard", &Instance::shard)
      .def_ro("rank", &Instance::rank)
      .def_ro("local_index", &Instance::local_index);
  nb::class_<Move>(m, "Move", "One shard of an expert's weights that has to travel when a placement replaces another.")
      .def_ro("expert", &Move::expert)
      .def_ro("shard", &Move::shard)
      .def_ro("from_rank", &Move::from_rank)
      .def_ro("to_rank", &Move::to_rank);
}

}  // namespace

void bind_placement(nb::module_& m) {
  bind_parts(m);
  nb::class_<Placement>(m, "Placement",
                        "Which rank holds which expert: immutable, the same on all ranks. Copies with equal hash are equal.")
      .def_static(
          "uniform",
          [](int num_experts, int ranks, bool require_equal_windows) {
            return Placement::uniform(num_experts, ranks, {.require_equal_windows = require_equal_windows});
          },
          nb::arg("num_experts"), nb::arg("ranks"), nb::arg("require_equal_windows") = false,
          "Contiguous windows of experts; the first num_experts % ranks ranks own one more.")
      .def_static("tensor_parallel", &Placement::tensor_parallel, nb::arg("num_experts"), nb::arg("ep"), nb::arg("tp"),
                  "Uniform windows over ep; shard t of an expert of window w is on rank w * tp + t. A token goes to all shards.")
      .def_static(
          "replicated",
          [](int num_experts, int ranks, const std::vector<double>& load, int redundant, int ranks_per_node) {
            return Placement::replicated(num_experts, ranks, load, redundant, {.ranks_per_node = ranks_per_node});
          },
          nb::arg("num_experts"), nb::arg("ranks"), nb::arg("load"), nb::arg("redundant"), nb::arg("ranks_per_node") = 0,
          "The heaviest experts get `redundant` extra replicas in total, packed over ranks to even the load [num_experts].")
      .def_static("custom", &Placement::custom, nb::arg("ranks"), nb::arg("replicas"), "replicas[e]: the replicas of expert e.")
      .def_static(
          "from_json", [](const std::string& text) { return Placement::from_json(text); }, nb::arg("text"))
      .def("to_json", &Placement::to_json)
      .def(
          "restricted_to", [](const Placement& self, const std::vector<int>& survivors) { return self.restricted_to(survivors); },
          nb::arg("survivors"), "What is left when only these ranks (ascending) remain, renumbered in that order.")
      .def_prop_ro("num_experts", &Placement::num_experts)
      .def_prop_ro("ranks", &Placement::ranks)
      .def_prop_ro("max_fanout", &Placement::max_fanout, "Most shards of any replica: the ranks one (token, k) is sent to.")
      .def_prop_ro("max_replicas", &Placement::max_replicas)
      .def_prop_ro("max_local_experts", &Placement::max_local_experts)
      .def(
          "local_experts", [](const Placement& self, int rank) { return to_list(self.local_experts(rank)); }, nb::arg("rank"),
          "The experts of a rank, ascending: local expert l is element l.")
      .def(
          "replicas",
          [](const Placement& self, int expert) {
            const auto replicas = self.replicas(expert);
            return std::vector<Replica>(replicas.begin(), replicas.end());
          },
          nb::arg("expert"))
      .def("instances", &Placement::instances, "Ordered by (expert, replica, shard).")
      .def("replica_for", &Placement::replica_for, nb::arg("expert"), nb::arg("source_rank"), nb::arg("token_index"),
           "The replica that serves this token of this rank.")
      .def_prop_ro("hash", &Placement::hash)
      .def("__hash__", &Placement::hash)
      .def(
          "__eq__", [](const Placement& self, const Placement& other) { return self.hash() == other.hash(); }, nb::arg("other"))
      .def("__repr__", [](const Placement& self) {
        return nb::str("<Placement of {} experts on {} ranks, {:x}>").format(self.num_experts(), self.ranks(), self.hash());
      });
  m.def("moves", &moves, nb::arg("before"), nb::arg("after"), "The shards of weights that have to travel from one placement to another.");
}

}  // namespace tokenyard::python
