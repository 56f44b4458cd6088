#pragma once
// Rows in blocks of float32: what a product takes. Places of one group at a time, so nothing outside it is ever touched.

#include <vector>

#include "tokenyard/experts.h"

namespace tokenyard::experts_internal {

// As many rows as a product gets at once: enough to be fast, little enough for scratch memory to stay in cache.
constexpr std::int64_t kBlockRows = 256;

// Elements to and from float32; exact, respectively rounded to nearest even.
void to_float(const std::byte* from, Dtype dtype, std::int64_t count, float* to);
void from_float(const float* from, Dtype dtype, std::int64_t count, std::byte* to);

struct Places {
  std::int64_t begin = 0;
  std::int64_t count = 0;
};

// Calls fn(group, places) for blocks of at most kBlockRows places, in order.
template <class Fn>
void for_each_block(const RowGroups& groups, Fn&& fn) {
  for (std::int64_t group = 0; group < std::ssize(groups.counts); ++group) {
    for (std::int64_t done = 0; done < groups.counts[group]; done += kBlockRows) {
      fn(group, Places{groups.begins[group] + done, std::min(kBlockRows, groups.counts[group] - done)});
    }
  }
}

// The rows of some places, dense: x[row of p] (through the gather map), or rows that lie by place.
const float* read_rows(const ConstTensorView& x, const RowGroups& groups, Places places, std::vector<float>& scratch);
const float* read_places(const ConstTensorView& y, Places places, std::vector<float>& scratch);
void write_places(const std::vector<float>& values, Places places, const TensorView& y);

// Group `group` of a dense [L, ...] tensor as float32. Remembers the last one that had to be converted, in memory that the thread keeps.
class GroupTensor {
 public:
  // scales: of float8_e4m3, for 128 x 128 elements.
  explicit GroupTensor(const ConstTensorView& tensor, const ConstTensorView& scales = {});
  ~GroupTensor();
  GroupTensor(const GroupTensor&) = delete;
  GroupTensor& operator=(const GroupTensor&) = delete;
  explicit operator bool() const { return static_cast<bool>(tensor_); }
  const float* of(std::int64_t group);

 private:
  void widen(std::int64_t group, std::int64_t elements, const std::byte* from);
  ConstTensorView tensor_, scales_;
  std::int64_t held_ = -1;
  std::vector<float> scratch_;
};

// UsageErrors. A matrix: two dimensions, contiguous rows, a floating type.
void check_groups(const RowGroups& groups);
void check_rows(const char* what, const ConstTensorView& view, std::int64_t rows, std::int64_t columns);
void check_dense(const char* what, const ConstTensorView& view, std::initializer_list<std::int64_t> shape);
void check_float32(const char* what, const ConstTensorView& view, std::initializer_list<std::int64_t> shape);
// x has every row that the groups name.
void check_input(const ConstTensorView& x, const RowGroups& groups);

struct ExpertSizes {
  std::int64_t experts = 0;
  std::int64_t width = 0;   // I
  std::int64_t hidden = 0;  // H
};
bool is_float8(const ExpertWeights& weights);
// w13 and w2, and the scales of float8_e4m3.
void check_products(const ExpertWeights& weights, const ExpertSizes& sizes);
// Gradients are asked for.
void check_differentiable(const ExpertWeights& weights);

}  // namespace tokenyard::experts_internal
