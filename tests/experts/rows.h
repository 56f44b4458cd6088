#pragma once
// Rows and groups for tests of experts: random sizes, empty and ragged groups, NaN wherever nobody may read or has written.

#include <bit>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "tokenyard/experts.h"
#include "unit/seeded_random.h"

namespace tokenyard::testing {

struct Case {
  RowGroups groups;
  std::int64_t num_rows = 0;
  std::vector<bool> is_read;  // of rows
  std::int64_t experts() const { return std::ssize(groups.counts); }
  std::int64_t row(std::int64_t place) const { return groups.rows.empty() ? place : groups.rows[static_cast<std::size_t>(place)]; }
  std::string describe() const {
    std::string text = groups.rows.empty() ? "rows by place, counts" : "gathered, counts";
    for (const std::int64_t count : groups.counts) text += " " + std::to_string(count);
    return text + " ";
  }
};

inline Case random_case(SeededRandom& random, std::int64_t most_per_group = 9) {
  Case result;
  const bool is_gathered = random.one_in(2);
  for (std::int64_t g = random.between(1, 5); g > 0; --g) {
    result.groups.begins.push_back(result.groups.places);
    result.groups.counts.push_back(random.one_in(4) ? 0 : random.between(1, most_per_group));
    result.groups.places += result.groups.counts.back() + (is_gathered ? 0 : random.between(0, 3));
  }
  result.num_rows = is_gathered ? random.between(1, most_per_group + 3) : result.groups.places;
  for (std::int64_t p = 0; is_gathered && p < result.groups.places; ++p)
    result.groups.rows.push_back(random.between(0, result.num_rows - 1));
  result.is_read.assign(static_cast<std::size_t>(result.num_rows), false);
  for (std::size_t g = 0; g < result.groups.counts.size(); ++g) {
    for (std::int64_t i = 0; i < result.groups.counts[g]; ++i) result.is_read[result.row(result.groups.begins[g] + i)] = true;
  }
  return result;
}

// A matrix of any floating type whose rows are three elements apart, so that a stride that is ignored shows.
class Buffer {
 public:
  static constexpr std::int64_t kOddGap = 3;
  static Buffer nan(Dtype dtype, std::int64_t rows, std::int64_t columns, std::int64_t gap = kOddGap) {
    return filled(dtype, rows, columns, std::numeric_limits<float>::quiet_NaN(), gap);
  }
  static Buffer filled(Dtype dtype, std::int64_t rows, std::int64_t columns, float value, std::int64_t gap = 0) {
    Buffer buffer(dtype, rows, columns, gap);
    for (std::int64_t i = 0; i < rows * buffer.stride_; ++i) buffer.put(i, value);
    return buffer;
  }
  static Buffer random(SeededRandom& random, Dtype dtype, std::int64_t rows, std::int64_t columns) {
    Buffer buffer(dtype, rows, columns, 0);
    for (std::int64_t i = 0; i < rows * columns; ++i) buffer.put(i, static_cast<float>(random.between(-1000, 1000)) / 1000.0F);
    return buffer;
  }
  // Input rows: those that no group reads are NaN.
  static Buffer rows(SeededRandom& random, Dtype dtype, const Case& c, std::int64_t columns, std::int64_t gap = kOddGap) {
    Buffer buffer = nan(dtype, c.num_rows, columns, gap);
    for (std::int64_t r = 0; r < c.num_rows; ++r) {
      if (c.is_read[static_cast<std::size_t>(r)]) buffer.draw_row(random, r);
    }
    return buffer;
  }
  // By place: padding is NaN.
  static Buffer places(SeededRandom& random, Dtype dtype, const Case& c, std::int64_t columns, std::int64_t gap = kOddGap) {
    Buffer buffer = nan(dtype, c.groups.places, columns, gap);
    for (std::size_t g = 0; g < c.groups.counts.size(); ++g) {
      for (std::int64_t i = 0; i < c.groups.counts[g]; ++i) buffer.draw_row(random, c.groups.begins[g] + i);
    }
    return buffer;
  }

  std::size_t num_bytes() const { return bytes_.size(); }
  Dtype dtype() const { return dtype_; }
  std::int64_t row_count() const { return rows_; }
  std::int64_t columns() const { return columns_; }
  double at(std::int64_t row, std::int64_t column) const { return get(row * stride_ + column); }
  double at_index(std::int64_t index) const { return at(index / columns_, index % columns_); }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  TensorView view() {
    TensorView view(bytes_.data(), dtype_, {rows_, columns_});
    view.strides[0] = stride_;
    return view;
  }
  ConstTensorView view() const {
    ConstTensorView view(bytes_.data(), dtype_, {rows_, columns_});
    view.strides[0] = stride_;
    return view;
  }
  static double rounded(float value, Dtype dtype) {
    Buffer one(dtype, 1, 1, 0);
    one.put(0, value);
    return one.get(0);
  }

 private:
  Buffer(Dtype dtype, std::int64_t rows, std::int64_t columns, std::int64_t gap)
      : dtype_(dtype),
        rows_(rows),
        columns_(columns),
        stride_(columns + gap),
        bytes_(static_cast<std::size_t>(rows * stride_ * size_of(dtype) + 1)) {}
  void draw_row(SeededRandom& random, std::int64_t row) {
    for (std::int64_t c = 0; c < columns_; ++c) put(row * stride_ + c, static_cast<float>(random.between(-1000, 1000)) / 1000.0F);
  }
  void put(std::int64_t index, float value) {
    const std::uint16_t half = dtype_ == Dtype::bfloat16 ? float_to_bfloat16(value) : float_to_float16(value);
    std::byte* to = bytes_.data() + index * size_of(dtype_);
    dtype_ == Dtype::float32 ? std::memcpy(to, &value, 4) : std::memcpy(to, &half, 2);
  }
  double get(std::int64_t index) const {
    const std::byte* from = bytes_.data() + index * size_of(dtype_);
    float value = 0;
    std::uint16_t half = 0;
    dtype_ == Dtype::float32 ? std::memcpy(&value, from, 4) : std::memcpy(&half, from, 2);
    if (dtype_ == Dtype::bfloat16) value = bfloat16_to_float(half);
    if (dtype_ == Dtype::float16) value = float16_to_float(half);
    return value;
  }

  Dtype dtype_;
  std::int64_t rows_;
  std::int64_t columns_;
  std::int64_t stride_;
  std::vector<std::byte> bytes_;
};

}  // namespace tokenyard::testing
