#pragma once
// A small exchange for tests about rules rather than shapes: 4 experts, top-2, at most 4 tokens of 8 float32 per rank.

#include <cstdint>
#include <random>
#include <vector>

#include "tokenyard/exchange.h"

namespace tokenyard::exchange_test {

constexpr int kSmallExperts = 4;
constexpr int kSmallTopK = 2;
constexpr std::int64_t kSmallTokens = 4;
constexpr std::int64_t kSmallHidden = 8;

inline ExchangeOptions small_options() {
  ExchangeOptions options;
  options.max_tokens_per_rank = kSmallTokens;
  options.max_row_bytes = kSmallHidden * 8;
  options.max_scale_bytes = 16;
  options.top_k = kSmallTopK;
  options.max_local_experts = kSmallExperts;
  options.timeout_ms = 20'000;
  return options;
}

inline Placement small_placement(int ranks) { return Placement::uniform(kSmallExperts, ranks); }

// One rank's tokens: rows and weights are small integers, so that sums are exact in any order; two different experts each.
template <class Real>
struct SmallTokens {
  std::vector<Real> rows;
  std::vector<std::int64_t> ids;
  std::vector<float> weights;
  std::int64_t tokens = 0;

  SmallTokens(int rank, unsigned seed, std::int64_t count = kSmallTokens) : tokens(count) {
    std::mt19937 random(seed * 1000 + static_cast<unsigned>(rank));
    for (std::int64_t i = 0; i < tokens * kSmallHidden; ++i) rows.push_back(static_cast<Real>(static_cast<int>(random() % 64) - 31));
    for (std::int64_t t = 0; t < tokens; ++t) {
      const auto first = static_cast<std::int64_t>(random() % kSmallExperts);
      ids.push_back(first);
      ids.push_back((first + 1 + static_cast<std::int64_t>(random() % (kSmallExperts - 1))) % kSmallExperts);
      for (int k = 0; k < kSmallTopK; ++k) weights.push_back(static_cast<float>(1 + random() % 8));
    }
  }
  static constexpr Dtype kDtype = sizeof(Real) == 8 ? Dtype::float64 : Dtype::float32;
  ConstTensorView rows_view() const { return {rows.data(), kDtype, {tokens, kSmallHidden}}; }
  DispatchInput input() const {
    return {.rows = rows_view(),
            .scales = {},
            .topk_ids = {ids.data(), Dtype::int64, {tokens, kSmallTopK}},
            .topk_weights = {weights.data(), Dtype::float32, {tokens, kSmallTopK}}};
  }
  // Rows alone, for a cached dispatch.
  DispatchInput rows_only() const { return {.rows = rows_view(), .scales = {}, .topk_ids = {}, .topk_weights = {}}; }
};

}  // namespace tokenyard::exchange_test
