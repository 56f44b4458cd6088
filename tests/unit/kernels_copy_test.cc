#include "kernel_rows.h"

namespace tokenyard::cpu {
namespace {

using testing::GuardedRow;
using testing::SeededRandom;

std::vector<std::byte> random_bytes(SeededRandom& random, std::size_t count) {
  std::vector<std::byte> bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

TEST(KernelsCopy, AnyLengthAndAlignmentStreamedOrNot) {
  SeededRandom random;
  testing::on_every_target([&] {
    for (const std::size_t bytes : {0, 1, 16, 48, 63, 64, 65, 127, 128, 144, 1000, 4096, 5760, 7168, 14336}) {
      for (int repeat = 0; repeat < 10; ++repeat) {
        const auto data = random_bytes(random, bytes);
        const GuardedRow from(random, bytes), to(random, bytes);
        std::copy(data.begin(), data.end(), from.data());
        copy_row(to.data(), from.data(), bytes, repeat % 2 == 0);
        stream_fence();
        ASSERT_TRUE(std::equal(data.begin(), data.end(), to.data())) << bytes;
        ASSERT_TRUE(to.untouched_outside()) << bytes;
      }
    }
  });
}

TEST(KernelsCopy, ToMany) {
  SeededRandom random;
  testing::on_every_target([&] {
    for (int repeat = 0; repeat < 60; ++repeat) {
      const int count = repeat % 10;
      // Whole cache lines on cache lines go another way.
      const std::int64_t unit = random.one_in(2) ? 64 : 16;
      const std::size_t bytes = unit * random.between(1, 200);
      const auto data = random_bytes(random, bytes);
      const GuardedRow from(random, bytes);
      std::copy(data.begin(), data.end(), from.data());
      std::vector<std::unique_ptr<GuardedRow>> rows;
      std::vector<void*> to;
      for (int i = 0; i < count; ++i) {
        rows.push_back(std::make_unique<GuardedRow>(random, bytes, unit));
        to.push_back(rows.back()->data());
      }
      copy_row_to_many(to.data(), count, from.data(), bytes, random.one_in(2));
      stream_fence();
      for (const auto& row : rows) {
        EXPECT_TRUE(std::equal(data.begin(), data.end(), row->data()));
        EXPECT_TRUE(row->untouched_outside());
      }
    }
  });
}

}  // namespace
}  // namespace tokenyard::cpu
