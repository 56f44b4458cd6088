#pragma once
// What the binding files share. The module is private: python/tokenyard is what people call.

#include <nanobind/nanobind.h>

#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "core/interrupt.h"
#include "tokenyard/error.h"
#include "tokenyard/quantise.h"

namespace tokenyard::python {

namespace nb = nanobind;

// One per file.
void bind_errors(nb::module_& m);
void bind_arrays(nb::module_& m);
void bind_world(nb::module_& m);
void bind_placement(nb::module_& m);
void bind_routing(nb::module_& m);
void bind_quantise(nb::module_& m);
void bind_options(nb::module_& m);
void bind_received(nb::module_& m);
void bind_exchange(nb::module_& m);
void bind_collective(nb::module_& m);
void bind_device_collective(nb::module_& m);
void bind_topo(nb::module_& m);
void bind_parallel(nb::module_& m);
void bind_safetensors(nb::module_& m);
void bind_weights(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_device_experts(nb::module_& m);
void bind_layer(nb::module_& m);
void bind_norm(nb::module_& m);

// "float32", "float32_pow2", "ue8m0".
ScaleFormat parse_scale_format(const std::string& text);

// The check of waits on this thread. On the main thread it lets Python's signal handlers run, and is true when one of them raised
// (Ctrl-C); on others it is true once cancel_waits() was called, which whoever gets that exception may do.
using Check = bool (*)();
Check check_of_this_thread();

// Runs what may wait for other ranks: without the GIL, and given up when a signal handler raises.
template <class Wait>
auto waiting(Wait&& wait) {
  using Result = std::invoke_result_t<Wait>;
  const InterruptScope scope(check_of_this_thread());
  std::exception_ptr error;
  std::conditional_t<std::is_void_v<Result>, char, std::optional<Result>> result{};
  {
    const nb::gil_scoped_release released;
    try {
      if constexpr (std::is_void_v<Result>)
        wait();
      else
        result.emplace(wait());
    } catch (...) {
      error = std::current_exception();
    }
  }
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  if (error) std::rethrow_exception(error);
  if constexpr (!std::is_void_v<Result>) return std::move(*result);
}

// Owns what must be destroyed without the GIL, because its end waits for threads or ranks.
template <class Value>
class WithoutGil {
 public:
  explicit WithoutGil(std::unique_ptr<Value> value) : value_(std::move(value)) {}
  WithoutGil(WithoutGil&&) noexcept = default;
  WithoutGil& operator=(WithoutGil&&) noexcept = default;
  ~WithoutGil() {
    if (!value_) return;
    const nb::gil_scoped_release released;
    value_.reset();
  }
  Value* operator->() const { return value_.get(); }
  Value& operator*() const { return *value_; }

 private:
  std::unique_ptr<Value> value_;
};

}  // namespace tokenyard::python
