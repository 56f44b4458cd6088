// What an exchange on a GPU keeps for its kernels: where each part lies, and what memory_plan says of it.

#include <gtest/gtest.h>

#include <algorithm>

#include "protocol/device_scratch.h"
#include "tokenyard/exchange.h"

namespace tokenyard::protocol {
namespace {

TEST(DeviceScratch, PartsHoldWhatTheyShouldAndFollowEachOther) {
  for (const std::int64_t tokens : {1, 127, 128, 129, 4096}) {
    for (const std::int64_t rows : {1, 128, 130, 9000, 100'000}) {
      const ArenaShape shape{.ranks = 5, .max_tokens_per_rank = tokens, .top_k = 7, .max_local_experts = 3, .receive_rows = rows};
      const DeviceScratch scratch = device_scratch(shape);
      for (const std::int64_t begin : {scratch.number, scratch.before, scratch.base, scratch.counts, scratch.own_counts, scratch.own_places,
                                       scratch.layout_counts, scratch.layout_sums}) {
        EXPECT_EQ(begin % 16, 0) << tokens << " tokens, " << rows << " rows";
      }
      EXPECT_GE(scratch.before - scratch.number, tokens * 5);
      EXPECT_GE((scratch.base - scratch.before) * kPlanChunk, tokens * 5);
      EXPECT_GE(scratch.counts - scratch.base, 5);
      EXPECT_GE(scratch.own_counts - scratch.counts, 5 * (1 + 3));
      EXPECT_GE((scratch.own_places - scratch.own_counts) * kPlanChunk, tokens * 3);
      EXPECT_GE(scratch.layout_counts - scratch.own_places, tokens * 7);
      const std::int64_t chunk = layout_chunk_rows(shape);
      EXPECT_EQ(chunk % kLayoutChunk, 0) << rows;
      EXPECT_LE(rows, chunk * kMostLayoutChunks);
      EXPECT_GE((scratch.layout_sums - scratch.layout_counts) * chunk, rows * (3 + 1));
      EXPECT_GE(layout_blocks(shape) * chunk, rows);
      EXPECT_EQ(scratch.words, scratch.layout_sums) << "few experts are summed up in shared memory";
    }
  }
}

// Every block of a layout has sums of its own where shared memory is too small for them.
TEST(DeviceScratch, HoldsTheSumsOfMoreExpertsThanSharedMemoryHas) {
  for (const int experts : {kMostSharedColumns - 1, kMostSharedColumns, 65'536}) {
    const ArenaShape shape{.ranks = 2, .max_tokens_per_rank = 16, .max_local_experts = experts, .receive_rows = 9000};
    const DeviceScratch scratch = device_scratch(shape);
    const std::int64_t wanted = experts < kMostSharedColumns ? 0 : 71 * layout_words(experts + 1, 1);
    EXPECT_EQ(layout_blocks(shape), 71);
    EXPECT_GE(scratch.words - scratch.layout_sums, wanted) << experts;
    EXPECT_EQ(scratch.words == scratch.layout_sums, wanted == 0) << experts;
  }
}

TEST(DeviceScratch, IsInThePlanOfMemory) {
  ExchangeOptions options;
  options.device = Device::cuda;
  options.max_tokens_per_rank = 1000;
  options.max_row_bytes = 256;
  options.max_local_experts = 4;
  const auto items = Exchange::memory_plan(options, 8).items;
  const auto scratch = std::find_if(items.begin(), items.end(), [](const MemoryItem& item) { return item.purpose == "scratch"; });
  ASSERT_NE(scratch, items.end());
  EXPECT_GE(scratch->bytes, 1000 * 8 * 4);
  options.device = Device::cpu;
  for (const MemoryItem& item : Exchange::memory_plan(options, 8).items) EXPECT_NE(item.purpose, "scratch");
}

}  // namespace
}  // namespace tokenyard::protocol
