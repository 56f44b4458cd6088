#pragma once
// A non-owning view of at most four dimensions: pointer, dtype, shape, strides in elements.

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "tokenyard/dtype.h"

namespace tokenyard {

template <class Pointer>  // void* or const void*
struct BasicTensorView {
  static constexpr int kMaxDims = 4;
  using Byte = std::conditional_t<std::is_same_v<Pointer, const void*>, const std::byte, std::byte>;

  Pointer data = nullptr;
  Dtype dtype = Dtype::uint8;
  int ndim = 0;  // 0: no tensor was given
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> strides{};

  BasicTensorView() = default;
  // A dense row-major tensor.
  BasicTensorView(Pointer pointer, Dtype type, std::initializer_list<std::int64_t> sizes)
      : data(pointer), dtype(type), ndim(static_cast<int>(sizes.size())) {
    int d = 0;
    for (std::int64_t size : sizes) shape[d++] = size;
    std::int64_t stride = 1;
    for (d = ndim - 1; d >= 0; --d) {
      strides[d] = stride;
      stride *= shape[d];
    }
  }
  // A mutable view reads as a const one.
  template <class Other>
  requires(std::is_same_v<Pointer, const void*>&& std::is_same_v<Other, void*>)
      BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT(google-explicit-constructor): a const view is a view
      : data(other.data), dtype(other.dtype), ndim(other.ndim), shape(other.shape), strides(other.strides) {}

  // Whether a tensor was given (an empty one, with a zero in its shape, was).
  explicit operator bool() const { return ndim > 0; }
  std::int64_t num_elements() const {
    std::int64_t n = ndim > 0 ? 1 : 0;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  // Address of index i along the first dimension.
  Byte* row(std::int64_t i) const { return static_cast<Byte*>(data) + i * strides[0] * size_of(dtype); }
  // Elements of one row lie next to each other (rows themselves may be strided).
  bool rows_contiguous() const {
    std::int64_t stride = 1;
    for (int d = ndim - 1; d >= 1; --d) {
      if (shape[d] != 1 && strides[d] != stride) return false;
      stride *= shape[d];
    }
    return true;
  }
  template <class T>
  auto as() const {
    return static_cast<std::conditional_t<std::is_same_v<Pointer, const void*>, const T*, T*>>(data);
  }
};

using TensorView = BasicTensorView<void*>;
using ConstTensorView = BasicTensorView<const void*>;

// "[3, 7168] bfloat16", for error texts.
std::string describe(const ConstTensorView& view);

}  // namespace tokenyard
