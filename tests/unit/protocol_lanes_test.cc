#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <vector>

#include "protocol/lanes.h"

namespace tokenyard::protocol {
namespace {

static_assert(LaneCut::of(0, 4, 4096).chunks() == 0);
static_assert(LaneCut::of(1, 4, 4096).chunks() == 1);

TEST(LaneCut, TakesEveryByteOnceInChunksThatFitASlot) {
  for (const int lanes : {1, 3, 32}) {
    for (const std::int64_t slot_bytes : {1024, 8192, 131072}) {
      for (const std::int64_t total : {0, 1, 15, 1024, 8191, 8193, 300'000, 5'000'001}) {
        const LaneCut cut = LaneCut::of(total, lanes, slot_bytes);
        EXPECT_EQ(cut.chunk_bytes % kChunkAlignment, 0);
        std::vector<std::int64_t> begins;
        std::int64_t bytes = 0;
        for (int lane = 0; lane < lanes; ++lane) {
          for (std::int64_t n = 0; n < cut.chunks_of(lane); ++n) {
            EXPECT_GT(cut.bytes(lane, n), 0);
            EXPECT_LE(cut.bytes(lane, n), slot_bytes);
            EXPECT_EQ(cut.begin(lane, n) % cut.chunk_bytes, 0);
            EXPECT_LE(cut.begin(lane, n) + cut.bytes(lane, n), total);
            begins.push_back(cut.begin(lane, n));
            bytes += cut.bytes(lane, n);
          }
        }
        EXPECT_EQ(std::set<std::int64_t>(begins.begin(), begins.end()).size(), begins.size()) << total << " in " << lanes;
        EXPECT_EQ(bytes, total) << lanes << " lanes, slots of " << slot_bytes;
      }
    }
  }
}

// Blocks are started for the most that may have to be sent: less must not need more lanes.
TEST(LaneCut, LessNeedsNoMoreLanes) {
  for (const int lanes : {1, 3, 32, 132}) {
    for (const std::int64_t slot_bytes : {std::int64_t{1024}, std::int64_t{30'000}, std::int64_t{4} << 20}) {
      std::int64_t most = 0;
      for (std::int64_t total = 0; total < std::int64_t{40} << 20; total = total * 5 / 4 + 1023) {
        const std::int64_t used = std::min<std::int64_t>(LaneCut::of(total, lanes, slot_bytes).chunks(), lanes);
        EXPECT_GE(used, most) << total << " bytes, " << lanes << " lanes, slots of " << slot_bytes;
        most = used;
      }
    }
  }
}

TEST(CountedRows, AreBoundedAndLieBehindEachOther) {
  const std::int32_t counts[] = {3, 0, 9, -1, 5};
  const std::int64_t rows[] = {3, 0, 5, 0, 5}, before[] = {0, 3, 3, 8, 8};
  for (int rank = 0; rank < 5; ++rank) {
    EXPECT_EQ(counted_rows(counts, rank, 5), rows[rank]) << rank;
    EXPECT_EQ(counted_rows_before(counts, rank, 5), before[rank]) << rank;
  }
}

TEST(LaneCut, EveryLaneHasSomethingOfALongTransfer) {
  const LaneCut cut = LaneCut::of(std::int64_t{64} << 20, 32, 128 << 10);
  for (int lane = 0; lane < 32; ++lane) EXPECT_GE(cut.chunks_of(lane), kLaneSlots);
}

TEST(LaneLayout, NothingOverlaps) {
  const LaneLayout layout = LaneLayout::of(3, 2, 1024, 777);
  std::set<std::int64_t> words;
  for (int rank = 0; rank < 3; ++rank) {
    for (int lane = 0; lane < 2; ++lane) {
      words.insert(layout.arrived(rank, lane));
      words.insert(layout.consumed(rank, lane));
    }
  }
  EXPECT_EQ(words.size(), 12U);
  EXPECT_GE(*words.begin(), layout.header(2, 3) + static_cast<std::int64_t>(sizeof(CollectiveHeader)));
  EXPECT_GE(layout.header(0, 0), 777);
  std::set<std::int64_t> slots;
  for (int rank = 0; rank < 3; ++rank) {
    for (int lane = 0; lane < 2; ++lane) {
      for (int n = 0; n < kLaneSlots; ++n) slots.insert(layout.slot(rank, lane, n));
    }
  }
  EXPECT_EQ(slots.size(), 6U * kLaneSlots);
  EXPECT_GE(*slots.begin(), *words.rbegin() + kCacheLine);
  EXPECT_EQ(*slots.rbegin() + 1024, layout.total);
  EXPECT_EQ(layout.slot(1, 1, 5), layout.slot(1, 1, 5 + kLaneSlots)) << "slots are used in turn";
}

TEST(CollectiveHeader, FitsWhatTheOtherEndSaysOfThePair) {
  const CollectiveHeader mine{.call = 3, .row_bytes = 8, .sends = 5, .expects = 7, .operation = 2, .dtype = 1};
  CollectiveHeader theirs = mine;
  theirs.sends = 7;
  theirs.expects = 5;
  EXPECT_TRUE(mine.fits(theirs));
  EXPECT_FALSE(mine.fits(mine));
  for (std::int64_t CollectiveHeader::*const field : {&CollectiveHeader::row_bytes, &CollectiveHeader::sends, &CollectiveHeader::expects}) {
    CollectiveHeader other = theirs;
    ++(other.*field);
    EXPECT_FALSE(mine.fits(other));
  }
  theirs.dtype = 2;
  EXPECT_FALSE(mine.fits(theirs));
}

}  // namespace
}  // namespace tokenyard::protocol
