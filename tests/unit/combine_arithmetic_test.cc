// The order of partial sums, their slots, and the cutting of rows, as kernels compute them, against the standard library.

#include "kernels/cuda/combine_arithmetic.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "unit/seeded_random.h"

namespace tokenyard::cuda {
namespace {

using testing::SeededRandom;

struct RandomRoute {
  std::vector<std::int32_t> slots, groups;
  std::vector<std::uint64_t> masks;
  TokenRoute route;

  explicit RandomRoute(SeededRandom& random) {
    const auto ranks = static_cast<int>(random.pick({1, 2, 3, 4, 5, 8, 31, 32, 33, 64, 70}));
    const auto top_k = static_cast<int>(random.pick({1, 2, 8, 9, 64}));
    for (int rank = 0; rank < ranks; ++rank) {
      const bool is_served = !random.one_in(3);
      slots.push_back(is_served ? static_cast<std::int32_t>(random.between(0, 99)) : -1);
      masks.push_back(is_served ? std::uint64_t{1} << random.between(0, top_k - 1) | (random() & (~std::uint64_t{0} >> (64 - top_k))) : 0);
      groups.push_back(static_cast<std::int32_t>(random.between(0, 2)));
    }
    route = {.slots = slots.data(),
             .k_masks = masks.data(),
             .groups = random.one_in(2) ? groups.data() : nullptr,
             .ranks = ranks,
             .order = random.one_in(2) ? Order::topk : Order::rank_ascending};
  }
  std::vector<int> served() const {
    std::vector<int> ranks;
    for (int rank = 0; rank < route.ranks; ++rank) {
      if (slots[rank] >= 0) ranks.push_back(rank);
    }
    return ranks;
  }
};

TEST(CombineArithmetic, PlacesFollowAStableSort) {
  SeededRandom random;
  for (int i = 0; i < 500; ++i) {
    const RandomRoute given(random);
    std::vector<int> sorted = given.served();
    std::stable_sort(sorted.begin(), sorted.end(), [&](int a, int b) {
      const auto key = [&](int rank) {
        return std::pair(given.route.groups != nullptr ? given.groups[rank] : 0,
                         given.route.order == Order::topk ? std::bit_width(given.masks[rank]) : 0);
      };
      return key(a) < key(b);
    });
    for (std::size_t place = 0; place < sorted.size(); ++place) {
      EXPECT_EQ(given.route.place_of(sorted[place]), static_cast<int>(place));
    }
  }
}

TEST(CombineArithmetic, ShardsOfATopKPositionCountUpwards) {
  SeededRandom random;
  for (int i = 0; i < 200; ++i) {
    const RandomRoute given(random);
    std::map<int, int> shards;
    for (const int rank : given.served()) {
      for (int k = 0; k < 64; ++k) {
        if ((given.masks[rank] >> k & 1) == 0) continue;
        EXPECT_EQ(given.route.shard_of(rank, k), shards[k]++);
      }
    }
  }
}

TEST(CombineArithmetic, EndsBeforeComparesTheHighestBits) {
  SeededRandom random;
  for (int i = 0; i < 2000; ++i) {
    const std::uint64_t a = random() >> random.between(0, 63), b = random() >> random.between(0, 63);
    EXPECT_EQ(ends_before(a, b), std::bit_width(a) < std::bit_width(b)) << a << " " << b;
  }
}

TEST(CombineArithmetic, SegmentsCoverARowOnceAndNoneIsEmpty) {
  for (const int vectors : {1, 2, 31, 32, 33, 64, 65, 360, 448, 896, 1024, 2048, 65536}) {
    for (const std::int64_t rows : {0, 1, 7, 128, 4096, 1'000'000}) {
      for (const std::int64_t warps : {1, 16, 384, 2112}) {
        const RowCut cut = RowCut::of(rows, warps, vectors);
        ASSERT_GT(cut.segments, 0);
        EXPECT_EQ(cut.length % RowCut::kStep, 0);
        EXPECT_LT((cut.segments - 1) * cut.length, vectors);
        EXPECT_GE(cut.segments * cut.length, vectors);
      }
    }
  }
  EXPECT_EQ(RowCut::of(100, 100, 0).segments, 1);
  EXPECT_EQ(RowCut::of(4096, 384, 896).segments, 1) << "many rows stay whole";
  EXPECT_EQ(RowCut::of(128, 2112, 896).segments, 14) << "few are cut";
}

TEST(CombineArithmetic, PiecesVisitEveryRowOfOthersOnce) {
  for (const int ranks : {2, 3, 4, 8}) {
    for (int rank = 0; rank < ranks; ++rank) {
      constexpr int kRows = 5, kSegments = 3;
      std::set<std::tuple<int, std::int64_t, int>> seen;
      for (std::int64_t n = 0; n < std::int64_t{kRows} * (ranks - 1) * kSegments; ++n) {
        const AwayPiece piece = AwayPiece::of(n, kSegments, rank, ranks);
        EXPECT_NE(piece.source, rank);
        EXPECT_TRUE(piece.source >= 0 && piece.source < ranks && piece.row < kRows && piece.segment < kSegments);
        seen.insert({piece.source, piece.row, piece.segment});
      }
      EXPECT_EQ(seen.size(), static_cast<std::size_t>(kRows * (ranks - 1) * kSegments));
      EXPECT_EQ(AwayPiece::of(0, kSegments, rank, ranks).source, (rank + 1) % ranks) << "a rank begins behind itself";
    }
  }
}

TEST(CombineArithmetic, StagingSlotsAreThoseOfTheArena) {
  const protocol::ArenaShape shape{.ranks = 8, .max_tokens_per_rank = 10, .top_k = 4, .max_fanout = 2, .unfolded = true};
  EXPECT_EQ(folded_slot(shape, 3, 2), 3 * 7 + 2);
  EXPECT_EQ(unfolded_slot(shape, 9, 3, 1), shape.staging_rows() - 1);
}

}  // namespace
}  // namespace tokenyard::cuda
