// The public quantise and dequantise: shapes, strides, and every argument that is refused.

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "expect_usage_error.h"
#include "tokenyard/quantise.h"

namespace tokenyard {
namespace {

TEST(ScaleColumns, OnePerBlockOrFourToAWord) {
  const std::pair<std::int64_t, std::pair<int, int>> known[] = {{0, {0, 0}},   {1, {1, 1}},   {128, {1, 1}},   {129, {2, 1}},
                                                                {512, {4, 1}}, {513, {5, 2}}, {7168, {56, 14}}};
  for (const auto& [hidden_size, columns] : known) {
    EXPECT_EQ(columns.first, scale_columns(hidden_size, ScaleFormat::float32)) << hidden_size;
    EXPECT_EQ(columns.first, scale_columns(hidden_size, ScaleFormat::float32_pow2)) << hidden_size;
    EXPECT_EQ(columns.second, scale_columns(hidden_size, ScaleFormat::ue8m0)) << hidden_size;
  }
}

TEST(Quantise, ThereAndBackIsCloseAndStridesAreRespected) {
  constexpr std::int64_t kTokens = 5, kHidden = 300, kColumns = 3, kPitch = 320;
  std::vector<float> x(kTokens * kPitch), back(kTokens * kPitch, -1.0f);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i)) * static_cast<float>(1 << (i / kPitch));
  std::vector<std::uint8_t> q(kTokens * kPitch, 0xee);
  std::vector<float> scales(kColumns * kTokens, -1.0f);  // one column after the other, as matrix kernels like it
  const auto pitched = [&](auto* data, Dtype dtype) {
    TensorView view(data, dtype, {kTokens, kHidden});
    view.strides[0] = kPitch;
    return view;
  };
  TensorView scale_view(scales.data(), Dtype::float32, {kTokens, kColumns});
  scale_view.strides = {1, kTokens};

  quantise(pitched(x.data(), Dtype::float32), pitched(q.data(), Dtype::float8_e4m3), scale_view, ScaleFormat::float32);
  dequantise(pitched(q.data(), Dtype::float8_e4m3), scale_view, pitched(back.data(), Dtype::float32), ScaleFormat::float32);

  for (std::int64_t t = 0; t < kTokens; ++t) {
    for (std::int64_t i = 0; i < kHidden; ++i) {
      const float scale = scales[(i / 128) * kTokens + t];
      EXPECT_GT(scale, 0);
      // Half a unit in the last place of e4m3: 1/16 of the number, or of the smallest normal one.
      EXPECT_NEAR(x[t * kPitch + i], back[t * kPitch + i], std::max(std::fabs(x[t * kPitch + i]) / 16, scale / 1024)) << t << ", " << i;
    }
    for (std::int64_t i = kHidden; i < kPitch; ++i) {
      EXPECT_EQ(0xee, q[t * kPitch + i]);
      EXPECT_EQ(-1.0f, back[t * kPitch + i]);
    }
  }
}

TEST(Quantise, EmptyTensorsNeedNoMemory) {
  for (const auto& [tokens, hidden_size] : {std::pair(0, 256), {3, 0}}) {
    const ConstTensorView x(nullptr, Dtype::bfloat16, {tokens, hidden_size});
    const TensorView q(nullptr, Dtype::float8_e4m3, {tokens, hidden_size});
    const TensorView scales(nullptr, Dtype::float32, {tokens, scale_columns(hidden_size, ScaleFormat::float32)});
    EXPECT_NO_THROW(quantise(x, q, scales, ScaleFormat::float32));
    EXPECT_NO_THROW(dequantise(q, scales, TensorView(nullptr, Dtype::bfloat16, {tokens, hidden_size}), ScaleFormat::float32));
  }
}

class QuantiseRefuses : public ::testing::Test {
 protected:
  // Either direction names the argument, what it is and what it should be.
  void expect_refusal(std::initializer_list<std::string_view> parts, ScaleFormat format = ScaleFormat::float32) {
    testing::expect_usage_error([&] { quantise(x, q, scales, format); }, parts);
    testing::expect_usage_error([&] { dequantise(q, scales, x, format); }, parts);
  }
  std::vector<float> memory = std::vector<float>(2 * 256);
  TensorView x{memory.data(), Dtype::float32, {2, 256}};
  TensorView q{memory.data(), Dtype::float8_e4m3, {2, 256}};
  TensorView scales{memory.data(), Dtype::float32, {2, 2}};
};

TEST_F(QuantiseRefuses, AWrongX) {
  x.dtype = Dtype::float64;
  expect_refusal({"x is [2, 256] float64", "bfloat16, float16 or float32"});
  x = TensorView(memory.data(), Dtype::float32, {512});
  expect_refusal({"x is [512] float32", "[tokens, hidden_size]"});
  x = {};
  expect_refusal({"x is no tensor"});
  x = TensorView(memory.data(), Dtype::float32, {2, 256});
  x.strides = {1, 2};
  expect_refusal({"x is [2, 256] float32 with strides [1, 2]", "contiguous rows"});
}

TEST_F(QuantiseRefuses, AWrongQ) {
  q = TensorView(memory.data(), Dtype::float8_e4m3, {2, 255});
  expect_refusal({"q is [2, 255] float8_e4m3", "[2, 256] float8_e4m3"});
  q = TensorView(memory.data(), Dtype::uint8, {2, 256});
  expect_refusal({"q is [2, 256] uint8"});
  q = TensorView(memory.data(), Dtype::float8_e4m3, {2, 256});
  q.strides = {1, 2};
  expect_refusal({"q is [2, 256] float8_e4m3 with strides [1, 2]", "contiguous rows"});
}

TEST_F(QuantiseRefuses, WrongScales) {
  scales = TensorView(memory.data(), Dtype::float32, {2, 3});
  expect_refusal({"scales is [2, 3] float32", "[2, 2] float32"});
  scales = TensorView(memory.data(), Dtype::float32, {1, 2});
  expect_refusal({"scales is [1, 2] float32", "[2, 2] float32"});
  scales = TensorView(memory.data(), Dtype::float32, {2, 2});
  expect_refusal({"scales is [2, 2] float32", "[2, 1] int32"}, ScaleFormat::ue8m0);
}

TEST_F(QuantiseRefuses, MissingMemory) {
  for (TensorView* view : {&x, &q, &scales}) {
    void* const data = std::exchange(view->data, nullptr);
    expect_refusal({"expected memory for each"});
    view->data = data;
  }
}

}  // namespace
}  // namespace tokenyard
