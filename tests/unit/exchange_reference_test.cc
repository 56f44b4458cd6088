// The oracle itself: its numbers against the library's conversions for every bit pattern, its rules against an example worked by hand.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "reference/naive_exchange.h"

namespace tokenyard {
namespace {

using naive::Bytes;

void expect_same_float(float a, double b, unsigned bits) {
  if (std::isnan(a))
    EXPECT_TRUE(std::isnan(b)) << "bits " << bits;
  else
    EXPECT_TRUE(static_cast<double>(a) == b && std::signbit(a) == std::signbit(b)) << "bits " << bits << ": " << a << " against " << b;
}

TEST(NaiveNumbers, ReadsEveryHalfAndBfloatLikeTheLibrary) {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const auto word = static_cast<std::uint16_t>(bits);
    std::uint8_t bytes[2];
    std::memcpy(bytes, &word, 2);
    expect_same_float(bfloat16_to_float(word), naive::read(Dtype::bfloat16, bytes, 0), bits);
    expect_same_float(float16_to_float(word), naive::read(Dtype::float16, bytes, 0), bits);
  }
}

TEST(NaiveNumbers, RoundsRandomFloatsLikeTheLibrary) {
  std::mt19937 random(20);
  for (int i = 0; i < 200'000; ++i) {
    const auto bits = static_cast<std::uint32_t>(random());
    float value = 0;
    std::memcpy(&value, &bits, 4);
    if (!std::isfinite(value)) continue;
    if (i % 2 == 0) value = std::ldexp(value, -std::ilogb(value == 0 ? 1.0F : value) + i % 50 - 30);  // where half and e4m3 have digits
    std::uint8_t bytes[2];
    std::uint16_t word = 0;
    naive::write(Dtype::bfloat16, bytes, 0, value);
    std::memcpy(&word, bytes, 2);
    ASSERT_EQ(word, float_to_bfloat16(value)) << value;
    naive::write(Dtype::float16, bytes, 0, value);
    std::memcpy(&word, bytes, 2);
    ASSERT_EQ(word, float_to_float16(value)) << value;
    naive::write(Dtype::float8_e4m3, bytes, 0, value);
    ASSERT_EQ(bytes[0], float_to_float8_e4m3(value)) << value;
  }
}

// Experts 0 and 1 on rank 0, expert 2 on rank 1; rank 0 has three tokens, rank 1 has one. A row is one float32: 10 * rank + token.
class HandWorked : public testing::Test {
 protected:
  static Bytes floats(const std::vector<float>& values) {
    Bytes bytes(values.size() * 4);
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }
  static std::vector<float> values(const Bytes& bytes) {
    std::vector<float> list(bytes.size() / 4);
    std::memcpy(list.data(), bytes.data(), bytes.size());
    return list;
  }
  naive::Placement placement{.ranks = 2, .experts = {{{{0}, 1}}, {{{0}, 1}}, {{{1}, 1}}}};
  std::vector<naive::Input> inputs = {
      {.tokens = 3, .rows = floats({0, 1, 2}), .ids = {2, 0, -1, -1, 1, 1}, .weights = {0.5F, 2, 9, 9, 3, 4}},
      {.tokens = 1, .rows = floats({10}), .ids = {0, 2}, .weights = {5, 6}},
  };
  naive::DispatchSpec spec(Layout layout) const {
    return {.layout = layout, .top_k = 2, .row_bytes = 4, .max_tokens = 3, .receive_rows = 6, .alignment = 4};
  }
  using Ints = std::vector<std::int32_t>;
};

TEST_F(HandWorked, TokenMajor) {
  const auto out = naive::dispatch(placement, inputs, spec(Layout::token_major));
  EXPECT_EQ(values(out[0].rows), (std::vector<float>{0, 2, 10}));
  EXPECT_EQ(out[0].local_ids, (Ints{-1, 0, 1, 1, 0, -1}));
  EXPECT_EQ(out[0].row_weights, (std::vector<float>{0.5F, 2, 3, 4, 5, 6}));
  EXPECT_EQ(out[0].source_rank, (Ints{0, 0, 1}));
  EXPECT_EQ(out[0].source_token, (Ints{0, 2, 0}));
  EXPECT_EQ(out[0].expert_counts, (Ints{2, 2}));
  EXPECT_EQ(out[0].expert_offsets, (Ints{0, 2, 4}));
  EXPECT_EQ(out[0].expert_rows, (Ints{0, 2, 1, 1}));
  EXPECT_EQ(out[0].rank_counts, (Ints{2, 1}));
  EXPECT_EQ(out[0].sent_counts, (Ints{2, 1}));
  EXPECT_EQ(values(out[1].rows), (std::vector<float>{0, 10}));
  EXPECT_EQ(out[1].sent_counts, (Ints{1, 1}));
}

TEST_F(HandWorked, ExpertMajorAligned) {
  const auto out = naive::dispatch(placement, inputs, spec(Layout::expert_major));
  EXPECT_EQ(out[0].expert_offsets, (Ints{0, 4, 8}));
  EXPECT_EQ(out[0].num_rows, 8);
  EXPECT_EQ(out[0].source_token, (Ints{0, 0, -1, -1, 2, 2, -1, -1}));
  EXPECT_EQ(out[0].source_k, (Ints{1, 0, -1, -1, 0, 1, -1, -1}));
  EXPECT_EQ(out[0].row_weights, (std::vector<float>{2, 5, 0, 0, 3, 4, 0, 0}));
}

TEST_F(HandWorked, ExpertPaddedDropsTheLastRows) {
  naive::DispatchSpec padded = spec(Layout::expert_padded);
  padded.expert_capacity = 1;
  EXPECT_TRUE(naive::dispatch(placement, inputs, padded)[0].overflow);
  padded.drop = true;
  const auto out = naive::dispatch(placement, inputs, padded);
  EXPECT_FALSE(out[0].overflow);
  EXPECT_EQ(out[0].dropped, (std::vector<std::int64_t>{1, 1}));
  EXPECT_EQ(out[0].ranges, (Ints{0, 1, 1, 0, 0, 1, 1, 0}));
  EXPECT_EQ(values(out[0].rows), (std::vector<float>{0, 2}));
}

TEST_F(HandWorked, RankSlots) {
  const auto out = naive::dispatch(placement, inputs, spec(Layout::rank_slots));
  EXPECT_EQ(out[0].present, (std::vector<std::uint8_t>{1, 0, 1, 1, 0, 0}));
  EXPECT_EQ(out[0].local_ids, (Ints{-1, 0, -1, -1, 1, 1, 0, -1, -1, -1, -1, -1}));
}

TEST_F(HandWorked, CombineFoldsSumsAndRoundsInOrder) {
  const naive::DispatchSpec expert_major = spec(Layout::expert_major);
  const auto received = naive::dispatch(placement, inputs, expert_major);
  // y: rank 0 has slots 0, 1 (expert 0) and 4, 5 (expert 1); rank 1 has slots 0, 1 (expert 2).
  std::vector<naive::CombineInput> y(2);
  y[0].y = floats({100, 200, NAN, NAN, 300, 400, NAN, NAN});
  y[0].row_weights = {1, 2, 0, 0, 4, 8, 0, 0};
  y[0].bias0 = floats({0.25F, 0.5F, 0.75F});
  y[1].y = floats({1000, 2000, NAN, NAN});
  y[1].row_weights = {16, 32, 0, 0};
  const naive::CombineSpec combine{.hidden_size = 1, .weighting = Weighting::at_expert, .row_weights = true};
  const auto out = naive::combine({expert_major, inputs, received}, y, combine);
  EXPECT_EQ(values(out[0].out), (std::vector<float>{0.25F + 2 * 100 + 0.5F * 1000, 0.5F, 0.75F + 3 * 300 + 4 * 400}));
  EXPECT_EQ(values(out[1].out), (std::vector<float>{5 * 200 + 6 * 2000}));
  EXPECT_EQ(out[0].combined_weights, (std::vector<float>{16, 1, 0, 0, 4, 8}));
  EXPECT_EQ(out[1].combined_weights, (std::vector<float>{2, 32}));
}

// One token on rank 0 that names the experts of ranks 2, 1 and 0, in this order.
class HandWorkedSum : public testing::Test {
 protected:
  float sum(const std::vector<float>& y_of_rank, const naive::CombineSpec& combine) const {
    const naive::Placement placement{.ranks = 3, .experts = {{{{0}, 1}}, {{{1}, 1}}, {{{2}, 1}}}};
    const std::vector<naive::Input> inputs = {{.tokens = 1, .rows = Bytes(4), .ids = {2, 1, 0}}, {}, {}};
    const naive::DispatchSpec spec{.top_k = 3, .row_bytes = 4, .max_tokens = 1, .receive_rows = 3};
    const auto received = naive::dispatch(placement, inputs, spec);
    std::vector<naive::CombineInput> y(3);
    for (int rank = 0; rank < 3; ++rank) {
      y[rank].y.resize(4);
      std::memcpy(y[rank].y.data(), &y_of_rank[rank], 4);
    }
    const auto out = naive::combine({spec, inputs, received}, y, combine);
    return static_cast<float>(naive::read(Dtype::float32, out[0].out.data(), 0));
  }
  static constexpr float kBig = 16777216.0F;  // 2^24: adding 1 to it changes nothing
};

TEST_F(HandWorkedSum, OrderShowsInTheRounding) {
  EXPECT_EQ(sum({kBig, 1, 1}, {.hidden_size = 1}), kBig);
  EXPECT_EQ(sum({kBig, 1, 1}, {.hidden_size = 1, .order = Order::topk}), kBig + 2);
}

TEST_F(HandWorkedSum, GroupsShowInTheRounding) {
  EXPECT_EQ(sum({kBig, 1, 1}, {.hidden_size = 1, .groups = {0, 0, 0}}), kBig);
  EXPECT_EQ(sum({kBig, 1, 1}, {.hidden_size = 1, .groups = {0, 1, 1}}), kBig + 2);
}

}  // namespace
}  // namespace tokenyard
