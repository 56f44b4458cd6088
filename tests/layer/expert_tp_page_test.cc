// docs/expert_tp.md says what the library computes, and both ways end at the sum over whole experts.

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <sstream>

#include "layer/expert_tp_page.h"

namespace tokenyard::testing {
namespace {

using namespace walk;  // NOLINT(google-build-using-namespace)

double expert_output(int expert, const Row& x, int h) {
  double sum = 0;
  for (int i = 0; i < kWidth; ++i) {
    double gate = 0, up = 0;
    for (int column = 0; column < kHidden; ++column) {
      gate += w13(expert, 0, i, column) * x[column];
      up += w13(expert, 1, i, column) * x[column];
    }
    sum += w2(expert, h, i) * gate / (1 + std::exp(-gate)) * up;
  }
  return sum;
}

void expect_whole_experts(const Seen& seen) {
  for (int rank = 0; rank < kRanks; ++rank) {
    ASSERT_EQ(seen[rank].out.size(), kTokens[rank].size());
    for (std::size_t t = 0; t < kTokens[rank].size(); ++t) {
      for (int h = 0; h < kHidden; ++h) {
        double expected = 0;
        for (std::size_t k = 0; k < kTopK; ++k) {
          const std::size_t pair = t * kTopK + k;
          expected += seen[rank].topk_weights[pair] * expert_output(seen[rank].ids[pair], kTokens[rank][t], h);
        }
        EXPECT_NEAR(seen[rank].out[t][h], expected, 1e-4) << "rank " << rank << " token " << t;
      }
      for (std::size_t k = 0; k < kTopK; ++k) {
        const std::size_t pair = t * kTopK + k;
        double expected = 0;
        for (int h = 0; h < kHidden; ++h) expected += expert_output(seen[rank].ids[pair], kTokens[rank][t], h);
        EXPECT_NEAR(seen[rank].d_topk_weights[pair], expected, 1e-4);
      }
    }
    EXPECT_EQ(seen[rank].layer_out, seen[rank].out) << "MoeLayer is these stages, bit for bit";
  }
}

TEST(ExpertTpPage, IsUpToDate) {
  const Seen by_virtual = virtual_experts(), by_gathered = gathered();
  expect_whole_experts(by_virtual);
  expect_whole_experts(by_gathered);
  const std::string page = expert_tp_page(by_virtual, by_gathered);
  std::ifstream file(TY_SOURCE_DIR "/docs/expert_tp.md");
  std::stringstream text;
  text << file.rdbuf();
  if (page == text.str()) return;
  std::ofstream("expert_tp.md") << page;
  FAIL() << "docs/expert_tp.md is not what the library computes; look at the difference, then copy expert_tp.md, now in this program's "
            "working folder, there";
}

}  // namespace
}  // namespace tokenyard::testing
