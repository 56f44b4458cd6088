#pragma once
// Memory that a step uses again: it grows to the largest step and stays.

#include <vector>

#include "tokenyard/tensor_view.h"

namespace tokenyard::layer_internal {

class Buffer {
 public:
  // Dense; what it holds is unspecified. Ends what an earlier view of this buffer was good for.
  TensorView view(Dtype dtype, std::int64_t rows, std::int64_t columns) {
    const auto bytes = static_cast<std::size_t>(rows * columns * size_of(dtype));
    if (bytes_.size() < bytes) bytes_.resize(bytes);
    return {bytes_.data(), dtype, {rows, columns}};
  }

 private:
  std::vector<std::byte> bytes_;
};

// Rows [begin, begin + count).
template <class Pointer>
BasicTensorView<Pointer> rows_of(BasicTensorView<Pointer> view, std::int64_t begin, std::int64_t count) {
  if (!view) return view;
  view.data = view.data == nullptr ? nullptr : view.row(begin);
  view.shape[0] = count;
  return view;
}

// A dense tensor whose last dimension stays and whose others become one, and back.
template <class Pointer>
BasicTensorView<Pointer> as_matrix(const BasicTensorView<Pointer>& view) {
  const std::int64_t columns = view.shape[view.ndim - 1];
  return {view.data, view.dtype, {columns == 0 ? 0 : view.num_elements() / columns, columns}};
}

}  // namespace tokenyard::layer_internal
