#include "tokenyard/quantise.h"

#include <nanobind/stl/string.h>

#include "arrays.h"
#include "core/usage.h"

namespace tokenyard::python {

ScaleFormat parse_scale_format(const std::string& text) {
  if (text == "float32") return ScaleFormat::float32;
  if (text == "float32_pow2") return ScaleFormat::float32_pow2;
  if (text == "ue8m0") return ScaleFormat::ue8m0;
  usage_error("scale format {}; expected float32, float32_pow2 or ue8m0", text);
}

void bind_quantise(nb::module_& m) {
  m.def(
      "scale_columns",
      [](std::int64_t hidden_size, const std::string& format) { return scale_columns(hidden_size, parse_scale_format(format)); },
      nb::arg("hidden_size"), nb::arg("format") = "float32");
  m.def(
      "quantise",
      [](const Tensor& x, const Tensor& q, const Tensor& scales, const std::string& format) {
        waiting([&] { quantise(x.view(), q.writable(), scales.writable(), parse_scale_format(format)); });
      },
      nb::arg("x"), nb::arg("q"), nb::arg("scales"), nb::arg("format"));
  m.def(
      "dequantise",
      [](const Tensor& q, const Tensor& scales, const Tensor& x, const std::string& format) {
        waiting([&] { dequantise(q.view(), scales.view(), x.writable(), parse_scale_format(format)); });
      },
      nb::arg("q"), nb::arg("scales"), nb::arg("x"), nb::arg("format"));
}

}  // namespace tokenyard::python
