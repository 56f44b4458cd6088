#include "tokenyard/exchange.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "arrays.h"
#include "world.h"

namespace tokenyard::python {
namespace {

using Held = WithoutGil<Exchange>;

// Arrays of a result whose memory the exchange allocated, or that was given as `out`.
nb::object owned(const TensorView& view, const std::shared_ptr<void>& memory, const Place& place) {
  return export_array(view, memory, place);
}

template <class Result>
struct Started {
  Pending<Result> pending;
  bool runs_on_thread;  // else a device runs it: finish() enqueues, also while a graph is captured, and nothing is to be polled
  bool handed_over = false;
};

// finish() of an operation that may run on another thread: looks often at first, so that short ones stay short.
template <class Result>
Result finish(Started<Result>& self) {
  if (self.handed_over) return self.pending.finish();  // throws: nothing is ready any more, and nothing will be
  Result result = waiting([&] {
    constexpr std::chrono::microseconds kLongest{500};
    auto pause = std::chrono::microseconds(5);
    auto ask_at = std::chrono::steady_clock::now() + kInterruptTick;
    while (self.runs_on_thread && !self.pending.ready()) {
      if (std::chrono::steady_clock::now() >= ask_at) {
        if (interrupted()) throw Error(kInterrupted);
        ask_at += kInterruptTick;
      }
      std::this_thread::sleep_for(pause);
      pause = std::min(kLongest, pause * 2);
    }
    self.handed_over = true;  // also when it fails: the error is handed over
    return self.pending.finish();
  });
  return result;
}

template <class Result>
void bind_pending(nb::module_& m, const char* class_name) {
  nb::class_<Started<Result>>(m, class_name).def("finish", finish<Result>).def("ready", [](const Started<Result>& self) {
    return self.pending.ready();
  });
}

void bind_results(nb::module_& m) {
  bind_pending<Received>(m, "PendingDispatch");
  bind_pending<Combined>(m, "PendingCombine");
  nb::class_<Combined>(m, "Combined")
      .def(
          "out", [](const Combined& self, const Place& place) { return owned(self.out, self.memory, place); }, nb::arg("place"))
      .def(
          "combined_weights", [](const Combined& self, const Place& place) { return owned(self.combined_weights, self.memory, place); },
          nb::arg("place"));
  nb::class_<DispatchGradient>(m, "DispatchGradient")
      .def(
          "rows", [](const DispatchGradient& self, const Place& place) { return owned(self.rows, self.memory, place); }, nb::arg("place"))
      .def(
          "topk_weights", [](const DispatchGradient& self, const Place& place) { return owned(self.topk_weights, self.memory, place); },
          nb::arg("place"));
  nb::class_<CombineGradient>(m, "CombineGradient")
      .def_ro("rows", &CombineGradient::rows)
      .def(
          "topk_weights", [](const CombineGradient& self, const Place& place) { return owned(self.topk_weights, self.memory, place); },
          nb::arg("place"));
  nb::class_<ExchangeStatus>(m, "ExchangeStatus", "What an exchange knows about its own health.")
      .def_prop_ro(
          "failure", [](const ExchangeStatus& self) { return self.failure ? std::optional(self.failure->message()) : std::nullopt; },
          "The sticky failure as text, or None.")
      .def_ro("invalid_ids", &ExchangeStatus::invalid_ids)
      .def_ro("lost_ids", &ExchangeStatus::lost_ids);
  nb::class_<MemoryItem>(m, "MemoryItem", "Bytes for one purpose, and the formula behind them.")
      .def_ro("purpose", &MemoryItem::purpose)
      .def_ro("bytes", &MemoryItem::bytes)
      .def_ro("formula", &MemoryItem::formula)
      .def("__repr__",
           [](const MemoryItem& self) { return self.purpose + ": " + std::to_string(self.bytes) + " bytes (" + self.formula + ")"; });
  nb::class_<PhaseSpan>(m, "PhaseSpan", "One phase of one call; nanoseconds of the steady clock.")
      .def_ro("phase", &PhaseSpan::phase)
      .def_ro("call", &PhaseSpan::call)
      .def_ro("begin_ns", &PhaseSpan::begin_ns)
      .def_ro("end_ns", &PhaseSpan::end_ns);
}

// tensors: (rows, scales, topk_ids, topk_weights), all but the first a tensor or None. Whoever calls keeps them.
DispatchInput input_of(const nb::tuple& tensors) {
  const auto view = [](nb::handle tensor) { return tensor.is_none() ? ConstTensorView{} : nb::cast<const Tensor&>(tensor).view(); };
  return {.rows = view(tensors[0]), .scales = view(tensors[1]), .topk_ids = view(tensors[2]), .topk_weights = view(tensors[3])};
}

// memory: (allocate, out_rows, out_scales, waits), each of them or None. allocate(rows, row_bytes, scale_bytes) -> (pointer, pointer) gives
// the memory of rows. Whoever calls keeps all of it.
DispatchOptions with_memory(DispatchOptions options, const nb::tuple& memory) {
  const nb::handle allocate = memory[0], out_rows = memory[1], out_scales = memory[2], waits = memory[3];
  if (!out_rows.is_none()) options.out_rows = nb::cast<const Tensor&>(out_rows).writable();
  if (!out_scales.is_none()) options.out_scales = nb::cast<const Tensor&>(out_scales).writable();
  if (!waits.is_none()) options.waits = nb::cast<const Tensor&>(waits).writable();
  if (allocate.is_none()) return options;
  options.allocate_out = [allocate](std::int64_t rows, std::int64_t row_bytes, std::int64_t scale_bytes) -> OutMemory {
    const nb::gil_scoped_acquire acquired;
    const auto [given, scales] = nb::cast<std::pair<std::uintptr_t, std::uintptr_t>>(allocate(rows, row_bytes, scale_bytes));
    return {reinterpret_cast<void*>(given), reinterpret_cast<void*>(scales)};
  };
  return options;
}

Received dispatch(Held& self, const nb::tuple& tensors, const DispatchOptions& given, const Handle* handle, const nb::tuple& memory) {
  const DispatchInput input = input_of(tensors);
  const DispatchOptions options = with_memory(given, memory);
  return waiting([&] { return handle != nullptr ? self->dispatch(input, *handle, options) : self->dispatch(input, options); });
}

bool runs_on_thread(const Held& self) { return self->options().device == Device::cpu; }

Started<Received> start_dispatch(Held& self, const nb::tuple& tensors, const DispatchOptions& given, const Handle* handle,
                                 const nb::tuple& memory) {
  const DispatchInput input = input_of(tensors);
  const DispatchOptions options = with_memory(given, memory);
  auto start = [&] { return handle != nullptr ? self->start_dispatch(input, *handle, options) : self->start_dispatch(input, options); };
  return {waiting(start), runs_on_thread(self)};
}

CombineOptions with_out(CombineOptions options, const Tensor* out) {
  if (out != nullptr) options.out = out->writable();
  return options;
}

Combined combine(Held& self, const Tensor& y, const Handle& handle, const CombineOptions& given, const Tensor* out) {
  const CombineOptions options = with_out(given, out);
  return waiting([&] { return self->combine(y.view(), handle, options); });
}

Started<Combined> start_combine(Held& self, const Tensor& y, const Handle& handle, const CombineOptions& given, const Tensor* out) {
  const CombineOptions options = with_out(given, out);
  return {waiting([&] { return self->start_combine(y.view(), handle, options); }), runs_on_thread(self)};
}

DispatchGradient dispatch_backward(Held& self, const Handle& handle, const Tensor& grad_rows, const Tensor* grad_row_weights) {
  return waiting([&] {
    return self->dispatch_backward(handle, grad_rows.view(), grad_row_weights != nullptr ? grad_row_weights->view() : ConstTensorView{});
  });
}

CombineGradient combine_backward(Held& self, const Handle& handle, const Tensor& grad_out, const Tensor* y, const CombineOptions& options) {
  return waiting([&] { return self->combine_backward(handle, grad_out.view(), y != nullptr ? y->view() : ConstTensorView{}, options); });
}

// Rows of the exchange's own memory: they live as long as it does, which the array sees to.
nb::object expert_rows(const nb::object& self, const Handle& handle, const std::string& dtype, std::int64_t hidden_size, const Place& place,
                       std::uintptr_t stream) {
  auto& held = nb::cast<Held&>(self);
  const TensorView rows =
      waiting([&] { return held->expert_rows(handle, parse_dtype(dtype), hidden_size, reinterpret_cast<void*>(stream)); });
  auto* exchange = new nb::object(self);
  return export_array(rows, std::shared_ptr<void>(exchange, [](void* owner) { delete static_cast<nb::object*>(owner); }), place);
}

std::vector<MemoryItem> memory_plan(const ExchangeOptions& options, int ranks) { return Exchange::memory_plan(options, ranks).items; }

void bind_calls(nb::class_<Held>& exchange) {
  exchange.def("dispatch", dispatch, nb::arg("tensors"), nb::arg("options"), nb::arg("handle").none(), nb::arg("memory"))
      .def("start_dispatch", start_dispatch, nb::arg("tensors"), nb::arg("options"), nb::arg("handle").none(), nb::arg("memory"))
      .def("combine", combine, nb::arg("y"), nb::arg("handle"), nb::arg("options"), nb::arg("out").none())
      .def("start_combine", start_combine, nb::arg("y"), nb::arg("handle"), nb::arg("options"), nb::arg("out").none())
      .def("dispatch_backward", dispatch_backward, nb::arg("handle"), nb::arg("grad_rows"), nb::arg("grad_row_weights").none())
      .def("combine_backward", combine_backward, nb::arg("handle"), nb::arg("grad_out"), nb::arg("y").none(), nb::arg("options"))
      .def("expert_rows", expert_rows, nb::arg("handle"), nb::arg("dtype"), nb::arg("hidden_size"), nb::arg("place"), nb::arg("stream"));
}

}  // namespace

void bind_exchange(nb::module_& m) {
  bind_results(m);
  m.def("memory_plan", memory_plan, nb::arg("options"), nb::arg("ranks"));
  nb::class_<Held> exchange(m, "Exchange");
  exchange
      .def(
          "__init__",
          [](Held* self, const RankWorld& world, const ExchangeOptions& options) {
            const World mine = world.world();
            new (self) Held(waiting([&] { return std::make_unique<Exchange>(mine, options); }));
          },
          nb::arg("world"), nb::arg("options"))
      .def(
          "add", [](Held& self, const Placement& placement) { return waiting([&] { return self->add(placement); }); }, nb::arg("placement"))
      .def(
          "abandon", [](Held& self, const std::string& reason) { waiting([&] { self->abandon(reason); }); }, nb::arg("reason"))
      .def("check", [](const Held& self) { self->check(); })
      .def("status", [](const Held& self) { return self->status(); })
      .def("clear", [](Held& self) { waiting([&] { self->clear(); }); })
      .def("recover", [](Held& self) { return waiting([&] { return self->recover(); }); })
      .def("world", [](const Held& self) { return RankWorld(self->world()); })
      .def("options", [](const Held& self) { return self->options(); })
      .def("transport", [](const Held& self) { return name(self->transport()); })
      .def("link_bytes", [](const Held& self) { return self->link_bytes(); })
      .def("peer_waits",
           [](const Held& self) {
             PeerWaits waits = self->peer_waits();
             return std::pair(std::move(waits.dispatch), std::move(waits.combine));
           })
      .def("take_spans", [](Held& self) { return self->take_spans(); });
  bind_calls(exchange);
}

}  // namespace tokenyard::python
