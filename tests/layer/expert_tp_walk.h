#pragma once
// The batch of docs/expert_tp.md, and what every rank saw of it.

#include <array>
#include <map>
#include <vector>

#include "tokenyard/layer.h"

namespace tokenyard::testing::walk {

constexpr int kExperts = 4, kTopK = 2, kRanks = 4, kShards = 2;
constexpr std::int64_t kHidden = 4, kWidth = 2;
using Row = std::array<float, kHidden>;

// Four tokens; rank 2 has none.
inline const std::array<std::vector<Row>, kRanks> kTokens = {{{{3, 2, 0, -1}, {0, 1, 3, 1}}, {{-1, 0, 2, 3}}, {}, {{2, -1, 1, 3}}}};

// Of all experts. w13 [E,2,I,H], w2 [E,H,I].
float w13(int expert, int projection, int i, int h);
float w2(int expert, int h, int i);

// The shard of one expert window.
struct Shard {
  std::vector<float> w13, w2;
  std::vector<std::int64_t> w13_rows;  // rows of [E * 2 * I] that it holds
  Shard(int ep, int tp);
  ExpertWeights weights() const;
};

struct ArrivedRow {
  int source = 0, token = 0;
  std::array<int, kTopK> local_ids{};
  std::array<float, kTopK> weights{};
  Row x{}, partial{};
  std::array<Row, kTopK> y{};           // of each k with an expert here
  std::array<float, kTopK> d_weight{};  // backward of sum(out)
};
struct SeenByRank {
  std::vector<int> ids;
  std::vector<float> topk_weights, d_topk_weights;
  std::vector<ArrivedRow> dispatched;  // by the exchange
  std::vector<ArrivedRow> computed;    // with gathered: those of both shards' ranks
  std::vector<Row> reduced;            // with gathered: what came back of the dispatched ones
  std::vector<Row> out, layer_out;
};
using Seen = std::array<SeenByRank, kRanks>;

// Every stage through the library's parts, and the same through MoeLayer.
Seen virtual_experts();
Seen gathered();

}  // namespace tokenyard::testing::walk
