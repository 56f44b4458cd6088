#include "layer/expert_tp_walk.h"

#include <algorithm>
#include <numeric>

namespace tokenyard::testing::walk {
namespace {

const std::vector<float>& gate_weight() {  // an expert's logit is the element of its number
  static const std::vector<float> weight = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1};
  return weight;
}

Gate gate() { return Gate::softmax(kTopK, /*renormalise=*/true); }

ConstTensorView matrix(const std::vector<float>& values, std::int64_t columns) {
  return {values.data(), Dtype::float32, {std::ssize(values) / columns, columns}};
}
TensorView matrix(std::vector<float>& values, std::int64_t columns) {
  return {values.data(), Dtype::float32, {std::ssize(values) / columns, columns}};
}

std::vector<float> flat(const std::vector<Row>& rows) {
  std::vector<float> values;
  for (const Row& row : rows) values.insert(values.end(), row.begin(), row.end());
  return values;
}
Row row_of(const ConstTensorView& view, std::int64_t row) {
  Row values;
  std::copy_n(reinterpret_cast<const float*>(view.row(row)), kHidden, values.begin());
  return values;
}
std::vector<Row> rows_of(const ConstTensorView& view) {
  std::vector<Row> rows;
  for (std::int64_t r = 0; r < view.shape[0]; ++r) rows.push_back(row_of(view, r));
  return rows;
}

// Rows with what they want of the local experts, as dispatch gave them or as gathered.
struct Rows {
  std::vector<float> x, weights;
  std::vector<std::int32_t> local_ids;
  std::int64_t count() const { return std::ssize(x) / kHidden; }
};

Rows rows_of(const Received& received) {
  const std::int64_t n = received.num_rows();
  const auto copy = [&](const auto* from, std::int64_t columns) {
    return std::vector<std::decay_t<decltype(*from)>>(from, from + n * columns);
  };
  return {copy(received.rows().as<float>(), kHidden), copy(received.row_weights().as<float>(), kTopK),
          copy(received.local_ids().as<std::int32_t>(), kTopK)};
}

std::vector<ArrivedRow> arrived(const Rows& rows, const std::vector<std::int32_t>& sources, const std::vector<std::int32_t>& tokens) {
  std::vector<ArrivedRow> result(static_cast<std::size_t>(rows.count()));
  for (std::size_t n = 0; n < result.size(); ++n) {
    result[n].source = sources[n];
    result[n].token = tokens[n];
    for (std::size_t k = 0; k < kTopK; ++k) {
      result[n].local_ids[k] = rows.local_ids[n * kTopK + k];
      result[n].weights[k] = rows.weights[n * kTopK + k];
    }
    std::copy_n(&rows.x[n * kHidden], kHidden, result[n].x.begin());
  }
  return result;
}

// What this shard makes of the rows, noted in `seen`: places, fold, and the gradient of the weights for a loss of sum(out).
struct Computed {
  std::vector<float> partials, d_weights;
};
Computed compute(const Rows& rows, const Shard& shard, std::vector<ArrivedRow>& seen) {
  const std::int64_t n = rows.count();
  const ConstTensorView ids(rows.local_ids.data(), Dtype::int32, {n, kTopK});
  const ConstTensorView weights(rows.weights.data(), Dtype::float32, {n, kTopK});
  const RowGroups groups = RowGroups::gathered(ids, kExperts / 2);
  std::vector<float> y(static_cast<std::size_t>(groups.places * kHidden)), d_y(y.size());
  experts_forward(matrix(rows.x, kHidden), groups, shard.weights(), {}, matrix(y, kHidden), nullptr);
  Computed result = {std::vector<float>(rows.x.size()), std::vector<float>(rows.weights.size())};
  unpermute({matrix(y, kHidden), ids, weights}, groups, matrix(result.partials, kHidden));
  const std::vector<float> ones(rows.x.size(), 1.0F);
  unpermute_backward({matrix(y, kHidden), ids, weights}, groups, matrix(ones, kHidden), matrix(d_y, kHidden),
                     {result.d_weights.data(), Dtype::float32, {n, kTopK}});
  std::vector<std::int64_t> next = groups.begins;
  for (std::size_t row = 0; row < seen.size(); ++row) {
    seen[row].partial = row_of(matrix(result.partials, kHidden), static_cast<std::int64_t>(row));
    for (std::size_t k = 0; k < kTopK; ++k) {
      const int local = seen[row].local_ids[k];
      if (local < 0) continue;
      seen[row].y[k] = row_of(matrix(y, kHidden), next[static_cast<std::size_t>(local)]++);
      seen[row].d_weight[k] = result.d_weights[row * kTopK + k];
    }
  }
  return result;
}

struct OnRank {
  std::vector<float> x;
  Routing routing;
  ParallelConfig config = solve_parallel({.device_count = kRanks, .ep = 2, .mlp_tp = kShards});

  explicit OnRank(int rank) : x(flat(kTokens[static_cast<std::size_t>(rank)])) { routing = route({.logits = matrix(x, kHidden)}, gate()); }
  ExpertGroupOptions options(ExpertTp expert_tp) const {
    return {.num_experts = kExperts, .top_k = kTopK, .hidden_size = kHidden, .max_tokens_per_rank = 2, .expert_tp = expert_tp};
  }
  Received dispatch(Exchange& exchange) const {
    return exchange.dispatch({.rows = matrix(x, kHidden), .topk_ids = routing.ids_view(), .topk_weights = routing.weights_view()},
                             {.layout = Layout::token_major});
  }
  void note(const Combined& sums, const DispatchGradient& gradient, SeenByRank& seen) const {
    seen.ids.assign(routing.topk_ids.begin(), routing.topk_ids.end());
    seen.topk_weights = routing.topk_weights;
    seen.d_topk_weights.assign(gradient.topk_weights.as<float>(), gradient.topk_weights.as<float>() + std::ssize(seen.ids));
    seen.out = rows_of(sums.out);
  }
};

std::vector<std::int32_t> integers(const ConstTensorView& view, std::int64_t count) {
  return {view.as<std::int32_t>(), view.as<std::int32_t>() + count};
}

std::vector<Row> through_layer(std::shared_ptr<ExpertGroup> group, const OnRank& rank, const Shard& shard) {
  MoeLayer layer(std::move(group), {.gate = {.weight = matrix(gate_weight(), kHidden)}, .experts = shard.weights()}, {.gate = gate()});
  std::vector<float> out(rank.x.size());
  layer.forward(matrix(rank.x, kHidden), matrix(out, kHidden));
  return rows_of(matrix(out, kHidden));
}

// All ranks' vectors, in rank order.
template <class T>
std::vector<T> gather(Collectives& shards, const std::vector<T>& mine, std::span<const std::int64_t> rows, std::int64_t columns) {
  constexpr Dtype dtype = std::is_same_v<T, float> ? Dtype::float32 : Dtype::int32;
  std::vector<T> all(static_cast<std::size_t>(std::accumulate(rows.begin(), rows.end(), std::int64_t{0}) * columns));
  shards.all_gather_v({mine.data(), dtype, {std::ssize(mine) / columns, columns}}, rows,
                      {all.data(), dtype, {std::ssize(all) / columns, columns}});
  return all;
}

void gathered_on(World& world, SeenByRank& seen) {
  const OnRank rank(world.rank());
  auto group = std::make_shared<ExpertGroup>(world, rank.config, rank.options(ExpertTp::gathered));
  const Shard shard(group->ep_rank(), group->tp_rank());
  seen.layer_out = through_layer(group, rank, shard);  // registers the placement, too
  Exchange& exchange = *group->exchange();
  const Received received = rank.dispatch(exchange);
  Rows rows = rows_of(received);
  std::vector<std::int32_t> sources = integers(received.source_rank(), rows.count()),
                            tokens = integers(received.source_token(), rows.count());
  for (std::int32_t& source : sources) source = source * kShards + group->tp_rank();  // its rank of the world
  seen.dispatched = arrived(rows, sources, tokens);

  Collectives& shards = *group->tp();
  const std::int64_t mine = rows.count();
  std::vector<std::int64_t> counts(kShards), one_each(kShards, 1);
  shards.all_gather_v({&mine, Dtype::int64, {1, 1}}, one_each, {counts.data(), Dtype::int64, {kShards, 1}});
  const Rows all = {gather(shards, rows.x, counts, kHidden), gather(shards, rows.weights, counts, kTopK),
                    gather(shards, rows.local_ids, counts, kTopK)};
  seen.computed = arrived(all, gather(shards, sources, counts, 1), gather(shards, tokens, counts, 1));
  const Computed computed = compute(all, shard, seen.computed);
  std::vector<float> reduced(rows.x.size()), d_weights(rows.weights.size());
  shards.reduce_scatter_v(matrix(computed.partials, kHidden), counts, matrix(reduced, kHidden));
  shards.reduce_scatter_v(matrix(computed.d_weights, kTopK), counts, matrix(d_weights, kTopK));
  seen.reduced = rows_of(matrix(reduced, kHidden));
  rank.note(exchange.combine(matrix(reduced, kHidden), received.handle()),
            exchange.dispatch_backward(received.handle(), matrix(reduced, kHidden), matrix(d_weights, kTopK)), seen);
}

void virtual_on(World& world, SeenByRank& seen) {
  const OnRank rank(world.rank());
  auto group = std::make_shared<ExpertGroup>(world, rank.config, rank.options(ExpertTp::virtual_experts));
  const Shard shard(group->ep_rank(), group->tp_rank());
  seen.layer_out = through_layer(group, rank, shard);
  Exchange& exchange = *group->exchange();
  const Received received = rank.dispatch(exchange);
  const Rows rows = rows_of(received);
  seen.dispatched = arrived(rows, integers(received.source_rank(), rows.count()), integers(received.source_token(), rows.count()));
  const Computed computed = compute(rows, shard, seen.dispatched);
  rank.note(exchange.combine(matrix(computed.partials, kHidden), received.handle()),
            exchange.dispatch_backward(received.handle(), matrix(computed.partials, kHidden), matrix(computed.d_weights, kTopK)), seen);
}

}  // namespace

// Arbitrary, and none is zero.
float w13(int expert, int projection, int i, int h) {
  return (static_cast<float>((7 * expert + 3 * projection + 5 * i + 2 * h + expert * h) % 9) - 3.5F) / 4;
}
float w2(int expert, int h, int i) { return (static_cast<float>((2 * expert + 3 * h + 5 * i + expert * i) % 7) - 2.5F) / 2; }

Shard::Shard(int ep, int tp) {
  constexpr int kLocal = kExperts / 2, kOfShard = kWidth / kShards;
  for (int e = ep * kLocal; e < (ep + 1) * kLocal; ++e) {
    for (int p = 0; p < 2; ++p) {
      for (int i = tp * kOfShard; i < (tp + 1) * kOfShard; ++i) {
        w13_rows.push_back((e * 2 + p) * kWidth + i);
        for (int h = 0; h < kHidden; ++h) w13.push_back(walk::w13(e, p, i, h));
      }
    }
    for (int h = 0; h < kHidden; ++h) {
      for (int i = tp * kOfShard; i < (tp + 1) * kOfShard; ++i) w2.push_back(walk::w2(e, h, i));
    }
  }
}

ExpertWeights Shard::weights() const {
  return {.w13 = {w13.data(), Dtype::float32, {kExperts / 2, 2, kWidth / kShards, kHidden}},
          .w2 = {w2.data(), Dtype::float32, {kExperts / 2, kHidden, kWidth / kShards}}};
}

Seen virtual_experts() {
  Seen seen;
  run_ranks(kRanks, [&](World& world) { virtual_on(world, seen[static_cast<std::size_t>(world.rank())]); });
  return seen;
}

Seen gathered() {
  Seen seen;
  run_ranks(kRanks, [&](World& world) { gathered_on(world, seen[static_cast<std::size_t>(world.rank())]); });
  return seen;
}

}  // namespace tokenyard::testing::walk
