#include "collective/agreement.h"

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace tokenyard::collective_internal {
namespace {

using Counts = std::vector<std::int64_t>;

// The records of all ranks of one call, as symmetric memory would hold them.
class Records {
 public:
  explicit Records(int ranks) : ranks_(ranks), memory_(ranks) {
    for (auto& bytes : memory_) bytes.reset(new (std::align_val_t{64}) std::byte[call_record_bytes(ranks)]());
  }
  CallRecord& of(int rank) { return *reinterpret_cast<CallRecord*>(memory_[rank].get()); }
  void set(int rank, const std::function<void(Call&)>& fill) {
    Call call(rank, ranks_);
    fill(call);
    write_record(of(rank), call, ranks_);
  }
  std::optional<Failure> verdict(int rank) {
    std::vector<const CallRecord*> records;
    for (int r = 0; r < ranks_; ++r) records.push_back(&of(r));
    return find_disagreement(records, rank);
  }

 private:
  struct Free {
    void operator()(std::byte* bytes) const { ::operator delete[](bytes, std::align_val_t{64}); }
  };
  int ranks_;
  std::vector<std::unique_ptr<std::byte[], Free>> memory_;
};

class Agreement : public testing::Test {
 protected:
  static constexpr int kRanks = 3;
  Agreement() : records_(kRanks), memory_(1000) {}

  ConstTensorView rows(std::int64_t n, Dtype dtype = Dtype::float32) { return {memory_.data(), dtype, {n, 2}}; }
  TensorView other_rows(std::int64_t n, Dtype dtype = Dtype::float32) { return {memory_.data() + 500, dtype, {n, 2}}; }
  void all_gather(int rank, const Counts& counts, Dtype dtype = Dtype::float32) {
    records_.set(rank, [&](Call& call) { call.set_all_gather(rows(counts[rank], dtype), counts, other_rows(total(counts), dtype)); });
  }
  void reduce_scatter(int rank, const Counts& counts) {
    records_.set(rank, [&](Call& call) { call.set_reduce_scatter(rows(total(counts)), counts, other_rows(counts[rank])); });
  }
  void all_to_all(int rank, const Counts& send, const Counts& receive) {
    records_.set(rank, [&](Call& call) { call.set_all_to_all(rows(total(send)), send, other_rows(total(receive)), receive); });
  }
  static std::int64_t total(const Counts& counts) {
    std::int64_t sum = 0;
    for (std::int64_t count : counts) sum += count;
    return sum;
  }
  // Every rank must come to the same verdict; peers[r] is whom rank r names.
  void expect_failure(FailureKind kind, const std::vector<int>& peers, const std::string& detail) {
    for (int rank = 0; rank < kRanks; ++rank) {
      const auto failure = records_.verdict(rank);
      ASSERT_TRUE(failure) << "rank " << rank;
      EXPECT_EQ(failure->kind, kind) << "rank " << rank;
      EXPECT_EQ(failure->rank, rank);
      EXPECT_EQ(failure->peer, peers[rank]) << "rank " << rank;
      EXPECT_NE(failure->detail.find(detail), std::string::npos) << failure->detail;
    }
  }
  void expect_agreement() {
    for (int rank = 0; rank < kRanks; ++rank) EXPECT_FALSE(records_.verdict(rank)) << records_.verdict(rank)->message();
  }

  Records records_;
  std::vector<float> memory_;
};

TEST_F(Agreement, EqualCallsGoOn) {
  for (int rank = 0; rank < kRanks; ++rank) records_.set(rank, [](Call& call) { call.set_barrier(); });
  expect_agreement();
  for (int rank = 0; rank < kRanks; ++rank) all_gather(rank, {4, 0, 2});
  expect_agreement();
  for (int rank = 0; rank < kRanks; ++rank) reduce_scatter(rank, {0, 0, 5});
  expect_agreement();
  all_to_all(0, {1, 2, 3}, {1, 0, 7});
  all_to_all(1, {0, 5, 0}, {2, 5, 8});
  all_to_all(2, {7, 8, 0}, {3, 0, 0});
  expect_agreement();
}

TEST_F(Agreement, DifferentOperationsNameBoth) {
  all_gather(0, {1, 1, 1});
  all_gather(1, {1, 1, 1});
  reduce_scatter(2, {1, 1, 1});
  expect_failure(FailureKind::mismatch, {2, 0, 0}, "rank 0 called all_gather_v of 2 x float32, rank 2 called reduce_scatter_v");
}

TEST_F(Agreement, DifferentDtypesNameBoth) {
  all_gather(0, {1, 1, 1});
  all_gather(1, {1, 1, 1}, Dtype::bfloat16);
  all_gather(2, {1, 1, 1}, Dtype::float16);
  expect_failure(FailureKind::mismatch, {1, 0, 0}, "rank 1 called all_gather_v of 2 x bfloat16");
}

TEST_F(Agreement, DifferentCountsNameTheFirstPair) {
  all_gather(0, {3, 1, 2});
  all_gather(1, {3, 1, 2});
  all_gather(2, {3, 4, 2});
  expect_failure(FailureKind::mismatch, {1, 2, 1}, "rank 1 sends 1 rows to rank 2, which expects 4");
}

TEST_F(Agreement, OnePairOfAnAllToAllIsSeenByAll) {
  all_to_all(0, {0, 0, 0}, {0, 0, 0});
  all_to_all(1, {0, 0, 9}, {0, 0, 0});
  all_to_all(2, {0, 0, 0}, {0, 8, 0});
  expect_failure(FailureKind::mismatch, {1, 2, 1}, "rank 1 sends 9 rows to rank 2, which expects 8");
  EXPECT_EQ(records_.verdict(0)->expected, 8);
  EXPECT_EQ(records_.verdict(0)->seen, 9);
}

TEST_F(Agreement, ARejectedCallAbortsAllAndGivesTheReason) {
  all_gather(0, {1, 1, 1});
  write_rejection(records_.of(1), "counts[2] is -1");
  write_rejection(records_.of(2), "another reason");
  expect_failure(FailureKind::aborted, {1, 1, 1}, "counts[2] is -1");
}

TEST_F(Agreement, ALongReasonIsCut) {
  all_gather(0, {1, 1, 1});
  all_gather(1, {1, 1, 1});
  write_rejection(records_.of(2), std::string(5000, 'x'));
  EXPECT_EQ(records_.verdict(0)->detail, std::string(CallRecord::kReasonBytes - 1, 'x'));
}

}  // namespace
}  // namespace tokenyard::collective_internal
