#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "collective/call.h"
#include "unit/expect_usage_error.h"

namespace tokenyard::collective_internal {
namespace {

using Counts = std::vector<std::int64_t>;
using testing::expect_usage_error;

// Rank 1 of 3; rows of 4 float32.
class CollectiveArguments : public ::testing::Test {
 protected:
  CollectiveArguments() : call_(1, 3), in_(400), out_(400) {}
  ConstTensorView in(std::int64_t rows) { return {in_.data(), Dtype::float32, {rows, 4}}; }
  TensorView out(std::int64_t rows) { return {out_.data(), Dtype::float32, {rows, 4}}; }
  Call call_;
  std::vector<float> in_;
  std::vector<float> out_;
};

TEST_F(CollectiveArguments, CountsPerRank) {
  expect_usage_error([&] { call_.set_all_gather(in(1), Counts{1, 1}, out(2)); }, {"all_gather_v", "counts has 2 entries", "world: 3"});
  expect_usage_error([&] { call_.set_all_gather(in(1), Counts{1, 1, -4}, out(2)); }, {"counts[2] is -4", ">= 0"});
  expect_usage_error([&] { call_.set_all_to_all(in(3), Counts{1, 1, 1}, out(3), Counts{1, 1, 1, 0}); }, {"receive_counts has 4"});
  const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
  expect_usage_error([&] { call_.set_all_gather(in(1), Counts{huge, 1, 1}, out(2)); }, {"overflow 64 bits at rank 1"});
}

TEST_F(CollectiveArguments, RowsAsCountsSay) {
  expect_usage_error([&] { call_.set_all_gather(in(2), Counts{1, 3, 1}, out(5)); }, {"in is [2, 4] float32", "rank 1 say 3 rows"});
  expect_usage_error([&] { call_.set_all_gather(in(3), Counts{1, 3, 1}, out(6)); }, {"out is [6, 4]", "say 5 rows"});
  expect_usage_error([&] { call_.set_reduce_scatter(in(3), Counts{1, 3, 1}, out(3)); }, {"reduce_scatter_v: in is [3, 4]", "say 5 rows"});
  expect_usage_error([&] { call_.set_reduce_scatter(in(5), Counts{1, 3, 1}, out(5)); }, {"out is [5, 4]", "say 3 rows"});
  expect_usage_error(
      [&] {
        call_.set_all_to_all(in(5), Counts{1, 3, 1}, out(5), Counts{1, 1, 1});
      },
      {"all_to_all_v: out is [5, 4]", "3 rows"});
}

TEST_F(CollectiveArguments, EqualRows) {
  expect_usage_error(
      [&] {
        call_.set_all_gather(in(1), Counts{1, 1, 1}, {out_.data(), Dtype::float32, {3, 5}});
      },
      {"[1, 4]", "[3, 5]", "equal"});
  expect_usage_error([&] { call_.set_all_gather(in(1), Counts{1, 1, 1}, {out_.data(), Dtype::int32, {3, 4}}); }, {"float32", "int32"});
  EXPECT_NO_THROW(call_.set_all_gather(in(1), Counts{1, 1, 1}, {out_.data(), Dtype::float32, {3, 2, 2}}));
}

TEST_F(CollectiveArguments, Tensors) {
  expect_usage_error([&] { call_.set_all_gather({}, Counts{1, 0, 1}, out(2)); }, {"no tensor was given as in"});
  expect_usage_error(
      [&] {
        call_.set_all_gather({nullptr, Dtype::float32, {2, 4}}, Counts{0, 2, 0}, out(2));
      },
      {"in is [2, 4]", "address 0"});
  expect_usage_error([&] { call_.set_all_gather({in_.data(), Dtype::float32, {1, -4}}, Counts{0, 1, 0}, out(1)); }, {"negative"});
  const std::int64_t huge = std::int64_t{1} << 40;
  expect_usage_error(
      [&] {
        call_.set_all_gather({in_.data(), Dtype::float32, {huge, 1 << 22}}, Counts{0, huge, 0}, out(1));
      },
      {"overflows 64 bits"});
  EXPECT_NO_THROW(call_.set_all_gather({nullptr, Dtype::float32, {0, 4}}, Counts{1, 0, 1}, out(2)));
}

TEST_F(CollectiveArguments, Strides) {
  ConstTensorView rows = in(3);
  rows.strides = {3, 1};
  expect_usage_error([&] { call_.set_all_gather(rows, Counts{0, 3, 0}, out(3)); }, {"strides [3, 1]", "must not overlap"});
  rows.strides = {8, 2};
  expect_usage_error([&] { call_.set_all_gather(rows, Counts{0, 3, 0}, out(3)); }, {"must be contiguous"});
  rows.strides = {9, 1};
  EXPECT_NO_THROW(call_.set_all_gather(rows, Counts{0, 3, 0}, out(3)));
}

TEST_F(CollectiveArguments, OnlyWhatCanBeAdded) {
  const ConstTensorView whole{in_.data(), Dtype::int32, {3, 4}};
  expect_usage_error(
      [&] {
        call_.set_reduce_scatter(whole, Counts{1, 1, 1}, {out_.data(), Dtype::int32, {1, 4}});
      },
      {"cannot add int32", "float64, float32, bfloat16 or float16"});
}

TEST_F(CollectiveArguments, InPlaceOnlyWhereItBelongs) {
  // all_gather_v: rows 2..3 of out are rank 1's.
  const Counts counts{2, 2, 1};
  call_.set_all_gather({out_.data() + 8, Dtype::float32, {2, 4}}, counts, out(5));
  EXPECT_TRUE(call_.in_place());
  expect_usage_error([&] { call_.set_all_gather({out_.data() + 4, Dtype::float32, {2, 4}}, counts, out(5)); }, {"overlap", "same address"});
  call_.set_all_gather(in(2), counts, out(5));
  EXPECT_FALSE(call_.in_place());
  // reduce_scatter_v: the sums may replace rank 1's own rows of in.
  call_.set_reduce_scatter(in(5), counts, {in_.data() + 8, Dtype::float32, {2, 4}});
  EXPECT_TRUE(call_.in_place());
  expect_usage_error([&] { call_.set_reduce_scatter(in(5), counts, {in_.data(), Dtype::float32, {2, 4}}); }, {"overlap"});
  TensorView strided{in_.data() + 8, Dtype::float32, {2, 4}};
  strided.strides[0] = 12;
  expect_usage_error([&] { call_.set_reduce_scatter(in(5), counts, strided); }, {"same stride"});
  expect_usage_error(
      [&] {
        call_.set_all_to_all(in(5), counts, {in_.data(), Dtype::float32, {3, 4}}, Counts{1, 1, 1});
      },
      {"use two buffers"});
}

TEST_F(CollectiveArguments, TouchingBuffersDoNotOverlap) {
  EXPECT_NO_THROW(call_.set_all_to_all(in(5), Counts{2, 2, 1}, {in_.data() + 20, Dtype::float32, {3, 4}}, Counts{1, 1, 1}));
}

}  // namespace
}  // namespace tokenyard::collective_internal
