// A case uses no tensor but those of its side: what the tests of other devices rely on. Here the side is other memory of the host.

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>

#include "multirank/exchange_run.h"

namespace tokenyard::exchange_test {
namespace {

class Elsewhere final : public Side {
 public:
  void* place(Bytes& bytes) override {
    Bytes& placed = memory_.emplace_back(bytes);
    std::fill(bytes.begin(), bytes.end(), 0xdd);  // whoever still reads here finds nothing
    return placed.data();
  }
  ConstTensorView fetch(const ConstTensorView& view, Bytes& copy) const override {
    if (view.num_elements() == 0) return view;
    std::int64_t last = 0;
    for (int d = 0; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
    const auto* from = static_cast<const std::uint8_t*>(view.data);
    copy.assign(from, from + (last + 1) * size_of(view.dtype));
    ConstTensorView here = view;
    here.data = copy.data();
    ++fetched_;
    return here;
  }
  std::size_t used() const { return std::min(memory_.size(), fetched_); }

 private:
  std::deque<Bytes> memory_;
  mutable std::size_t fetched_ = 0;
};

TEST(ExchangeSide, HoldsEveryTensorOfACase) {
  for (std::uint64_t seed = 70'000; seed < 70'030; ++seed) {
    const Case c = random_case(seed);
    if (c.is(kMemory)) continue;
    const CaseData data = make_case_data(c);
    run_ranks(static_cast<int>(c.number(kRanks)), [&](World& world) {
      Elsewhere side;
      run_rank(data, world, side);
      EXPECT_GT(side.used(), 0U);
    });
  }
}

TEST(ExchangeSide, CasesOfGpusHaveNoFloat64) {
  for (const Case& c : pairwise_cases(1, Device::cuda)) {
    EXPECT_NE(c.as<Dtype>(kDtype), Dtype::float64) << describe(c);
    const ExchangeOptions options = make_case_data(c).options;
    EXPECT_EQ(options.device, Device::cuda);
    EXPECT_TRUE(options.transport == Transport::cuda_peer || options.transport == Transport::automatic);
  }
}

}  // namespace
}  // namespace tokenyard::exchange_test
