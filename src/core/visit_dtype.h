#pragma once
// From a run-time dtype to a compile-time one: the only such switch.

#include <type_traits>

#include "core/usage.h"
#include "tokenyard/dtype.h"

namespace tokenyard {

template <Dtype kDtype>
using DtypeConstant = std::integral_constant<Dtype, kDtype>;

// Calls visitor(DtypeConstant<...>) with a dtype that combine can add.
template <class Visitor>
decltype(auto) visit_summable(Dtype dtype, Visitor&& visitor) {
  switch (dtype) {
    case Dtype::float64:
      return visitor(DtypeConstant<Dtype::float64>());
    case Dtype::float32:
      return visitor(DtypeConstant<Dtype::float32>());
    case Dtype::bfloat16:
      return visitor(DtypeConstant<Dtype::bfloat16>());
    case Dtype::float16:
      return visitor(DtypeConstant<Dtype::float16>());
    default:
      usage_error("dtype {}; expected float64, float32, bfloat16 or float16", name(dtype));
  }
}

}  // namespace tokenyard
