// The arithmetic that kernels share with the CPU engine, against the CPU's own words for it.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "protocol/block_scale.h"
#include "protocol/call.h"
#include "protocol/device_mailbox.h"
#include "protocol/overflow.h"
#include "seeded_random.h"
#include "tokenyard/dtype.h"

namespace tokenyard::protocol {
namespace {

using testing::SeededRandom;

float any_float(SeededRandom& random) { return std::bit_cast<float>(static_cast<std::uint32_t>(random.between(0, 0xffffffffLL))); }

TEST(BlockScale, ElementsRoundLikeDtype) {
  for (std::uint64_t bits = 0; bits <= 0xffffffffULL; bits += 4099) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    ASSERT_EQ(e4m3_bits(value), float_to_float8_e4m3(value)) << "float32 bits " << bits;
  }
  for (int code = 0; code < 255; ++code) {  // every number, every tie between two, and their neighbours
    const float value = float8_e4m3_to_float(static_cast<std::uint8_t>(code));
    const float tie = (value + float8_e4m3_to_float(static_cast<std::uint8_t>(code + 1))) / 2;
    for (const float at : {value, tie}) {
      for (const int step : {-1, 0, 1}) {
        const auto near = std::bit_cast<float>(std::bit_cast<std::uint32_t>(at) + static_cast<std::uint32_t>(step));
        ASSERT_EQ(e4m3_bits(near), float_to_float8_e4m3(near)) << "near code " << code;
      }
    }
  }
}

TEST(BlockScale, BlocksAreQuantisedLikeTheCpuKernel) {
  SeededRandom random;
  for (int round = 0; round < 3000; ++round) {
    const auto elements = static_cast<int>(random.between(1, kQuantiseBlock));
    const bool wild = random.one_in(3);
    const double magnitude = std::ldexp(1.0, static_cast<int>(random.between(-40, 120)));
    std::vector<float> x(elements);
    for (float& element : x) {
      element = wild ? any_float(random) : static_cast<float>(magnitude * static_cast<double>(random.between(-1000, 1000)) / 999);
    }
    std::uint32_t largest = 0;
    for (const float element : x) largest = std::max(largest, amax_bits(element));
    for (const ScaleFormat format : {ScaleFormat::float32, ScaleFormat::float32_pow2, ScaleFormat::ue8m0}) {
      std::vector<std::uint8_t> q(elements);
      std::uint32_t scale = 0;
      cpu::quantise_row(
          {.x = x.data(), .elements = elements, .format = format, .q = q.data(), .scales = reinterpret_cast<std::byte*>(&scale)});
      const BlockScale block = block_scale(largest, format);
      ASSERT_EQ(block.stored, scale);
      for (int i = 0; i < elements; ++i) ASSERT_EQ(e4m3_bits(x[i] * block.factor), q[i]) << x[i] << " times " << block.factor;
    }
  }
}

ExpertTally tally(const CountLimits& limits, const std::vector<std::int64_t>& counts) {
  ExpertTally whole;
  for (std::size_t local = 0; local < counts.size(); ++local) whole.add(limits, static_cast<std::int64_t>(local), counts[local]);
  return whole;
}

TEST(Overflow, FirstBrokenLimitInOrder) {
  CountLimits limits{.receive_rows = 10, .expert_capacity = 4, .max_layout_rows = 16, .alignment = 8, .expert_layout = true};
  auto excess = [&](std::int64_t rows, const std::vector<std::int64_t>& counts) {
    return find_overflow(limits, rows, tally(limits, counts));
  };
  EXPECT_EQ(excess(10, {4, 4}).excess, Excess::none);
  EXPECT_EQ(excess(11, {5, 4}).excess, Excess::receive_rows);
  EXPECT_EQ(excess(11, {5, 4}).needed, 11);
  EXPECT_EQ(excess(10, {1, 5, 9}).needed, 5);
  EXPECT_EQ(excess(10, {1, 5, 9}).capacity, 4);
  EXPECT_EQ(excess(10, {1, 1, 1}).excess, Excess::layout_rows);
  EXPECT_EQ(excess(10, {1, 1, 1}).needed, 24);
  EXPECT_EQ(excess(10, {1, 0, 1}).excess, Excess::none);
  limits.drop = true;
  EXPECT_EQ(excess(10, {9, 9}).excess, Excess::none);
  EXPECT_EQ(tally(limits, {9, 9}).layout_rows, 16);
  EXPECT_EQ(tally(limits, {9, 9}).pairs, 18);
  limits.expert_layout = false;
  EXPECT_EQ(excess(10, {99, 99, 99}).excess, Excess::none);
  EXPECT_EQ(excess(0, {}).excess, Excess::none);
}

TEST(Overflow, PartsMergeInAnyOrder) {
  SeededRandom random;
  const CountLimits limits{.receive_rows = 1000, .expert_capacity = 6, .alignment = 4, .expert_layout = true};
  for (int round = 0; round < 300; ++round) {
    std::vector<std::int64_t> counts(random.between(0, 70));
    for (std::int64_t& count : counts) count = random.between(0, 7);
    const ExpertTally whole = tally(limits, counts);
    constexpr int kParts = 8;
    ExpertTally parts[kParts];
    for (std::size_t local = 0; local < counts.size(); ++local) {
      parts[local % kParts].add(limits, static_cast<std::int64_t>(local), counts[local]);
    }
    for (int distance = 1; distance < kParts; distance *= 2) {  // as lanes of a warp merge
      ExpertTally before[kParts];
      std::copy(parts, parts + kParts, before);
      for (int part = 0; part < kParts; ++part) parts[part].merge(before[part ^ distance]);
    }
    for (const ExpertTally& merged : parts) {
      EXPECT_EQ(merged.pairs, whole.pairs);
      EXPECT_EQ(merged.layout_rows, whole.layout_rows);
      EXPECT_EQ(merged.excess_local, whole.excess_local);
      EXPECT_EQ(merged.excess_count, whole.excess_count);
    }
  }
}

// Every field that a wrong call may differ in, with small values as calls have them.
TEST(Digest, DiffersWhereHeadersDo) {
  const CallHeader base{.call = 7, .placement_hash = 0x1234, .row_bytes = 14336, .operation = Operation::dispatch, .top_k = 8};
  std::vector<CallHeader> headers;
  for (unsigned n = 0; n < 200; ++n) {
    const auto byte = static_cast<std::uint8_t>(n);
    const auto add = [&](auto&& change) { change(headers.emplace_back(base)); };
    add([&](CallHeader& h) { h.call += n + 1; });
    add([&](CallHeader& h) { h.placement_hash += n + 1; });
    add([&](CallHeader& h) { h.handle_call += n + 1; });
    add([&](CallHeader& h) { h.row_bytes += n + 1; });
    add([&](CallHeader& h) { h.scale_bytes += n + 1; });
    for (std::uint8_t CallHeader::*field : {&CallHeader::layout, &CallHeader::mode, &CallHeader::top_k, &CallHeader::dtype,
                                            &CallHeader::weighting, &CallHeader::unfolded, &CallHeader::row_weights}) {
      add([&](CallHeader& h) { h.*field = static_cast<std::uint8_t>(h.*field + byte + 1); });
    }
  }
  headers.push_back(base);
  headers.emplace_back(base).operation = Operation::combine;
  std::set<std::uint32_t> digests;
  for (const CallHeader& header : headers) {
    EXPECT_LT(digest(header), 1U << kFlagBits);
    digests.insert(digest(header));
  }
  // 2402 headers, 2^24 digests: 0.17 pairs are alike by chance.
  EXPECT_GE(digests.size(), headers.size() - 2);
}

TEST(CountWords, SayOfWhichCallTheyAre) {
  for (const std::uint64_t call : {std::uint64_t{1}, std::uint64_t{0xffffffff}, std::uint64_t{1} << 32, (std::uint64_t{1} << 40) + 7}) {
    for (const std::int32_t count : {0, 1, 4096, std::numeric_limits<std::int32_t>::max()}) {
      const std::uint64_t word = count_word(call, count);
      EXPECT_EQ(count_in(word), count);
      EXPECT_TRUE(is_count_of(word, call));
      EXPECT_FALSE(is_count_of(word, call - 2)) << "the last one in its place";
      EXPECT_FALSE(is_count_of(word, call + 2));
    }
  }
  EXPECT_FALSE(is_count_of(0, 1)) << "a fresh arena";
}

}  // namespace
}  // namespace tokenyard::protocol
