#include "core/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "expect_usage_error.h"

namespace tokenyard {
namespace {

struct Part {
  std::int64_t begin;
  std::int64_t end;
  int thread;
  std::thread::id id;
};

std::vector<Part> parts_of(ThreadPool& pool, std::int64_t count, std::int64_t grain) {
  std::vector<Part> parts;
  std::mutex mutex;
  pool.parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end, int thread) {
    const std::lock_guard lock(mutex);
    parts.push_back({begin, end, thread, std::this_thread::get_id()});
  });
  std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.begin < b.begin; });
  return parts;
}

TEST(ThreadPool, PartsAreContiguousEvenAndInThreadOrder) {
  for (int threads = 1; threads <= 5; ++threads) {
    ThreadPool pool(threads);
    EXPECT_EQ(threads, pool.num_threads());
    for (const std::int64_t count : {1, 2, 4, 5, 7, 1000}) {
      const auto parts = parts_of(pool, count, 1);
      ASSERT_EQ(std::min<std::int64_t>(threads, count), static_cast<std::int64_t>(parts.size()));
      std::int64_t end = 0;
      for (int i = 0; i < static_cast<int>(parts.size()); ++i) {
        EXPECT_EQ(i, parts[i].thread);
        EXPECT_EQ(end, parts[i].begin);
        end = parts[i].end;
        EXPECT_LE(std::abs(parts[i].end - parts[i].begin - count / static_cast<std::int64_t>(parts.size())), 1);
      }
      EXPECT_EQ(count, end);
    }
  }
}

TEST(ThreadPool, EachPartHasItsOwnThreadAndTheCallerHasTheFirst) {
  ThreadPool pool(3);
  const auto parts = parts_of(pool, 3, 1);
  std::set<std::thread::id> ids;
  for (const Part& part : parts) ids.insert(part.id);
  EXPECT_EQ(3u, ids.size());
  EXPECT_EQ(std::this_thread::get_id(), parts.front().id);
}

TEST(ThreadPool, AShortRangeRunsOnFewerThreads) {
  ThreadPool pool(4);
  EXPECT_EQ(1u, parts_of(pool, 9, 10).size());
  EXPECT_EQ(2u, parts_of(pool, 20, 10).size());
  EXPECT_EQ(4u, parts_of(pool, 1000, 10).size());
  EXPECT_EQ(4u, parts_of(pool, 4, 0).size());
}

TEST(ThreadPool, NothingToDoCallsNothing) {
  ThreadPool pool(2);
  EXPECT_TRUE(parts_of(pool, 0, 1).empty());
  EXPECT_TRUE(parts_of(pool, -3, 1).empty());
}

TEST(ThreadPool, ThreadsBelowOneAreRefused) {
  testing::expect_usage_error([] { ThreadPool pool(0); }, {"num_threads = 0", "at least 1"});
}

TEST(ThreadPool, TheFirstExceptionIsRethrownAfterAllPartsEnded) {
  ThreadPool pool(4);
  for (int repeat = 0; repeat < 50; ++repeat) {
    std::atomic<int> ended = 0;
    try {
      pool.parallel_for(4, 1, [&](std::int64_t, std::int64_t, int thread) {
        ++ended;
        if (thread >= 1) throw std::runtime_error("part " + std::to_string(thread));
      });
      FAIL() << "no exception";
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ("part 1", error.what());
    }
    EXPECT_EQ(4, ended);
    EXPECT_EQ(4u, parts_of(pool, 4, 1).size()) << "the pool still works";
  }
}

TEST(ThreadPool, AnExceptionOfTheCallersPartIsRethrownToo) {
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads);
    EXPECT_THROW(pool.parallel_for(9, 1,
                                   [](std::int64_t, std::int64_t, int thread) {
                                     if (thread == 0) throw 7;
                                   }),
                 int);
  }
}

TEST(ThreadPool, ACallFromInsideABodyIsABrokenInvariant) {
  ThreadPool pool(2);
  const auto nothing = [](std::int64_t, std::int64_t, int) {};
  EXPECT_THROW(pool.parallel_for(2, 1, [&](std::int64_t, std::int64_t, int) { pool.parallel_for(2, 1, nothing); }), std::logic_error);
  EXPECT_EQ(2u, parts_of(pool, 2, 1).size());
}

TEST(ThreadPool, WritesOfEveryPartAreSeenByTheCallerAndByTheNextCall) {
  ThreadPool pool(4);
  std::vector<std::int64_t> values(1000, 0);  // not atomic: the sanitizer for threads checks the ordering
  for (int repeat = 0; repeat < 2000; ++repeat) {
    const std::int64_t grain = repeat % 3 == 0 ? 1 : 400;  // other parts, so other threads, each time
    pool.parallel_for(1000, grain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) ++values[i];
    });
    ASSERT_EQ(repeat + 1, values[repeat % 1000]);
  }
  for (const std::int64_t value : values) ASSERT_EQ(2000, value);
}

TEST(ThreadPool, ComesAndGoes) {
  for (int repeat = 0; repeat < 200; ++repeat) {
    ThreadPool idle(3);
    ThreadPool used(2);
    EXPECT_EQ(2u, parts_of(used, 2, 1).size());
  }
}

}  // namespace
}  // namespace tokenyard
