#include "collective/row_bytes.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

namespace tokenyard::collective_internal {
namespace {

// 5 rows of 3 int32, stored 4 apart: element (r, c) is 4 * r + c, and 4 * r + 3 is a gap.
class StridedRows : public testing::Test {
 protected:
  StridedRows() : data_(20) {
    std::iota(data_.begin(), data_.end(), 0);
    view_ = TensorView(data_.data(), Dtype::int32, {5, 3});
    view_.strides[0] = 4;
  }
  std::vector<std::int32_t> data_;
  TensorView view_;
};

TEST_F(StridedRows, PacksAcrossRowBorders) {
  const RowBytes<const std::byte> rows(ConstTensorView(view_), 12, 1, 4);
  EXPECT_EQ(rows.bytes(), 48);
  std::vector<std::int32_t> packed(7);
  pack(reinterpret_cast<std::byte*>(packed.data()), rows, 4, 28);  // from the second element of row 1
  EXPECT_EQ(packed, (std::vector<std::int32_t>{5, 6, 8, 9, 10, 12, 13}));
}

TEST_F(StridedRows, UnpacksAroundGaps) {
  const std::vector<std::int32_t> source{-1, -2, -3, -4};
  unpack(RowBytes<std::byte>(view_, 12, 2, 2), 8, 16, reinterpret_cast<const std::byte*>(source.data()));
  std::vector<std::int32_t> expected(20);
  std::iota(expected.begin(), expected.end(), 0);
  expected[10] = -1;
  expected[12] = -2;
  expected[13] = -3;
  expected[14] = -4;
  EXPECT_EQ(data_, expected);
}

TEST_F(StridedRows, RunsEndWithRows) {
  std::vector<std::int64_t> sizes;
  RowBytes<std::byte>(view_, 12, 0, 5).for_each_run(8, 32, [&](std::byte*, std::int64_t, std::int64_t size) { sizes.push_back(size); });
  EXPECT_EQ(sizes, (std::vector<std::int64_t>{4, 12, 12, 4}));
}

TEST_F(StridedRows, CopiesBetweenDifferentStrides) {
  std::vector<std::int32_t> dense(15, -1);
  copy_rows(RowBytes<std::byte>(TensorView(dense.data(), Dtype::int32, {5, 3}), 12, 0, 5),
            RowBytes<const std::byte>(ConstTensorView(view_), 12, 0, 5));
  EXPECT_EQ(dense, (std::vector<std::int32_t>{0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18}));
}

TEST(RowBytes, DenseRowsAreOneRun) {
  std::vector<std::int32_t> data(12);
  int runs = 0;
  RowBytes<std::byte>(TensorView(data.data(), Dtype::int32, {4, 3}), 12, 0, 4)
      .for_each_run(0, 48, [&](std::byte*, std::int64_t, std::int64_t size) {
        ++runs;
        EXPECT_EQ(size, 48);
      });
  EXPECT_EQ(runs, 1);
}

TEST(RowBytes, NoRowsAreNoBytes) {
  const TensorView none(nullptr, Dtype::float32, {0, 8});
  EXPECT_EQ(RowBytes<std::byte>(none, 32, 0, 0).bytes(), 0);
  const TensorView flat(nullptr, Dtype::float32, {3, 0});
  EXPECT_EQ(RowBytes<std::byte>(flat, 0, 0, 3).bytes(), 0);
}

}  // namespace
}  // namespace tokenyard::collective_internal
