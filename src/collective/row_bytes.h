#pragma once
// The bytes of consecutive rows as one sequence [0, bytes()), although rows may lie apart.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tokenyard/tensor_view.h"

namespace tokenyard::collective_internal {

template <class Byte>  // std::byte or const std::byte
class RowBytes {
 public:
  RowBytes() = default;
  template <class View>
  RowBytes(const View& view, std::int64_t row_bytes, std::int64_t first_row, std::int64_t rows)
      : row_bytes_(row_bytes), rows_(row_bytes > 0 ? rows : 0) {
    if (rows_ == 0) return;
    data_ = view.row(first_row);
    stride_ = view.strides[0] * size_of(view.dtype);
    if (rows == 1 || stride_ == row_bytes) {  // no gaps: one long row, so that runs are as long as they can be
      row_bytes_ *= rows;
      rows_ = 1;
    }
  }

  std::int64_t bytes() const { return row_bytes_ * rows_; }

  // fn(pointer, at, size) for every contiguous run of [begin, begin + count), in order; `at` counts from begin.
  template <class Fn>
  void for_each_run(std::int64_t begin, std::int64_t count, Fn&& fn) const {
    for (std::int64_t at = 0; at < count;) {
      const std::int64_t row = (begin + at) / row_bytes_;
      const std::int64_t within = (begin + at) % row_bytes_;
      const std::int64_t size = std::min(row_bytes_ - within, count - at);
      fn(data_ + row * stride_ + within, at, size);
      at += size;
    }
  }

 private:
  Byte* data_ = nullptr;
  std::int64_t row_bytes_ = 0;
  std::int64_t stride_ = 0;
  std::int64_t rows_ = 0;
};

inline void pack(std::byte* to, const RowBytes<const std::byte>& from, std::int64_t begin, std::int64_t count) {
  from.for_each_run(begin, count, [&](const std::byte* run, std::int64_t at, std::int64_t size) { std::memcpy(to + at, run, size); });
}

inline void unpack(const RowBytes<std::byte>& to, std::int64_t begin, std::int64_t count, const std::byte* from) {
  to.for_each_run(begin, count, [&](std::byte* run, std::int64_t at, std::int64_t size) { std::memcpy(run, from + at, size); });
}

// Whole sequences of the same length.
inline void copy_rows(const RowBytes<std::byte>& to, const RowBytes<const std::byte>& from) {
  to.for_each_run(0, to.bytes(), [&](std::byte* run, std::int64_t at, std::int64_t size) { pack(run, from, at, size); });
}

}  // namespace tokenyard::collective_internal
