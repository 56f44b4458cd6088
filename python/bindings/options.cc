// Options, whose enumerations are words in Python.

#include "tokenyard/options.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "tokenyard/exchange.h"

namespace tokenyard::python {
namespace {

// A word for an enumeration.
template <auto kMember, auto kParse, class Options>
void word(nb::class_<Options>& options, const char* attribute) {
  options.def_prop_rw(
      attribute, [](const Options& self) { return std::string(name(self.*kMember)); },
      [](Options& self, const std::string& text) { self.*kMember = kParse(text); });
}

// A tensor; the caller keeps it alive as long as the options are used.
template <auto kMember, class Options>
void tensor_in(nb::class_<Options>& options, const char* attribute) {
  options.def_prop_rw(
      attribute, [](const Options& self) { return describe(self.*kMember); },
      [](Options& self, const Tensor& tensor) { self.*kMember = tensor.writable(); });  // most are only read
}

// A cudaStream_t as the number that frameworks show.
template <class Options>
void stream(nb::class_<Options>& options) {
  options.def_prop_rw(
      "stream", [](const Options& self) { return reinterpret_cast<std::uintptr_t>(self.stream); },
      [](Options& self, std::uintptr_t stream) { self.stream = reinterpret_cast<void*>(stream); });
}

void bind_exchange_options(nb::module_& m) {
  using O = ExchangeOptions;
  nb::class_<O> options(m, "ExchangeOptions");
  options.def(nb::init<>())
      .def_rw("max_tokens_per_rank", &O::max_tokens_per_rank)
      .def_rw("max_row_bytes", &O::max_row_bytes)
      .def_rw("max_scale_bytes", &O::max_scale_bytes)
      .def_rw("top_k", &O::top_k)
      .def_rw("max_local_experts", &O::max_local_experts)
      .def_rw("max_fanout", &O::max_fanout)
      .def_rw("receive_rows", &O::receive_rows)
      .def_rw("max_expert_rows", &O::max_expert_rows)
      .def_rw("depth", &O::depth)
      .def_rw("expert_rows", &O::expert_rows)
      .def_rw("unfolded", &O::unfolded)
      .def_rw("reduction_groups", &O::reduction_groups)
      .def_rw("device_index", &O::device_index)
      .def_rw("sm_budget", &O::sm_budget)
      .def_rw("num_threads", &O::num_threads)
      .def_rw("validate", &O::validate)
      .def_rw("trace", &O::trace)
      .def_rw("timeout_ms", &O::timeout_ms)
      .def_prop_rw(
          "nccl_communicator", [](const O& self) { return reinterpret_cast<std::uintptr_t>(self.nccl_communicator); },
          [](O& self, std::uintptr_t communicator) { self.nccl_communicator = reinterpret_cast<void*>(communicator); });
  word<&O::mode, parse_mode>(options, "mode");
  word<&O::transport, parse_transport>(options, "transport");
  word<&O::device, parse_device>(options, "device");
}

void bind_dispatch_options(nb::module_& m) {
  using O = DispatchOptions;
  nb::class_<O> options(m, "DispatchOptions");
  options.def(nb::init<>())
      .def_rw("placement", &O::placement)
      .def_rw("gather_map", &O::gather_map)
      .def_rw("alignment", &O::alignment)
      .def_rw("zero_padding", &O::zero_padding)
      .def_rw("expert_capacity", &O::expert_capacity)
      .def_rw("drop", &O::drop)
      .def_rw("copy_out", &O::copy_out)
      .def_rw("token_base", &O::token_base)
      .def_prop_rw(
          "mode", [](const O& self) { return self.mode ? std::string(name(*self.mode)) : std::string("default"); },
          [](O& self, const std::string& text) { self.mode = parse_mode(text); })
      .def_prop_rw(
          "quantise", [](const O& self) { return self.quantise.has_value(); },
          [](O& self, const std::string& text) { self.quantise = parse_scale_format(text); });
  word<&O::layout, parse_layout>(options, "layout");
  word<&O::sizing, parse_sizing>(options, "sizing");
  stream(options);
}

void bind_combine_options(nb::module_& m) {
  using O = CombineOptions;
  nb::class_<O> options(m, "CombineOptions");
  options.def(nb::init<>()).def_rw("fold", &O::fold);
  word<&O::weighting, parse_weighting>(options, "weighting");
  word<&O::order, parse_order>(options, "order");
  tensor_in<&O::source_weights>(options, "source_weights");
  tensor_in<&O::row_weights>(options, "row_weights");
  tensor_in<&O::bias0>(options, "bias0");
  tensor_in<&O::bias1>(options, "bias1");
  tensor_in<&O::waits>(options, "waits");
  stream(options);
}

}  // namespace

void bind_options(nb::module_& m) {
  bind_exchange_options(m);
  bind_dispatch_options(m);
  bind_combine_options(m);
}

}  // namespace tokenyard::python
