#include "tokenyard/tensor_view.h"

#include <fmt/format.h>

#include <span>

namespace tokenyard {

std::string describe(const ConstTensorView& view) {
  if (!view) return "no tensor";
  const auto dims = [&](const auto& values) { return fmt::join(std::span(values).first(view.ndim), ", "); };
  std::string text = fmt::format("[{}] {}", dims(view.shape), name(view.dtype));
  std::int64_t dense = 1;
  bool strided = false;
  for (int d = view.ndim - 1; d >= 0; --d) {
    strided |= view.shape[d] > 1 && view.strides[d] != dense;
    dense *= view.shape[d];
  }
  if (strided) text += fmt::format(" with strides [{}]", dims(view.strides));
  return text;
}

}  // namespace tokenyard
