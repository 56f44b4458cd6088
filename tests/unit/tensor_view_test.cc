#include <gtest/gtest.h>

#include "tokenyard/tensor_view.h"

namespace tokenyard {
namespace {

TEST(TensorView, NothingGiven) {
  const TensorView none;
  EXPECT_FALSE(none);
  EXPECT_EQ(0, none.num_elements());
  EXPECT_EQ("no tensor", describe(none));
}

TEST(TensorView, DenseStridesAreRowMajor) {
  float data[24];
  const TensorView view(data, Dtype::float32, {2, 3, 4});
  EXPECT_TRUE(view);
  EXPECT_EQ(24, view.num_elements());
  EXPECT_EQ((std::array<std::int64_t, 4>{12, 4, 1, 0}), view.strides);
  EXPECT_EQ(reinterpret_cast<std::byte*>(data + 12), view.row(1));
  EXPECT_EQ(data, view.as<float>());
  EXPECT_TRUE(view.rows_contiguous());
  EXPECT_EQ("[2, 3, 4] float32", describe(view));
}

TEST(TensorView, AnEmptyTensorWasGiven) {
  const TensorView view(nullptr, Dtype::bfloat16, {0, 7168});
  EXPECT_TRUE(view);
  EXPECT_EQ(0, view.num_elements());
  EXPECT_EQ("[0, 7168] bfloat16", describe(view));
}

TEST(TensorView, RowsMayBeStrided) {
  std::uint16_t data[32];
  TensorView view(data, Dtype::bfloat16, {2, 8});
  view.strides[0] = 16;
  EXPECT_TRUE(view.rows_contiguous());
  EXPECT_EQ(reinterpret_cast<std::byte*>(data + 16), view.row(1));
  EXPECT_EQ("[2, 8] bfloat16 with strides [16, 1]", describe(view));
  view.strides = {1, 2};
  EXPECT_FALSE(view.rows_contiguous());
  EXPECT_EQ("[2, 8] bfloat16 with strides [1, 2]", describe(view));
}

TEST(TensorView, TheStrideOfASingleElementDoesNotMatter) {
  float data[4];
  TensorView view(data, Dtype::float32, {4, 1});
  view.strides[1] = 99;
  EXPECT_TRUE(view.rows_contiguous());
  EXPECT_EQ("[4, 1] float32", describe(view));
}

TEST(TensorView, ReadsAsAConstView) {
  std::int64_t data[6];
  TensorView view(data, Dtype::int64, {2, 3});
  view.strides[0] = 4;
  const ConstTensorView same = view;
  EXPECT_EQ(view.data, same.data);
  EXPECT_EQ(view.dtype, same.dtype);
  EXPECT_EQ(view.ndim, same.ndim);
  EXPECT_EQ(view.shape, same.shape);
  EXPECT_EQ(view.strides, same.strides);
  static_assert(std::is_same_v<const std::int64_t*, decltype(same.as<std::int64_t>())>);
}

}  // namespace
}  // namespace tokenyard
