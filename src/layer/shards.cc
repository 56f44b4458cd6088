#include "layer/shards.h"

#include <numeric>

#include "tokenyard/norm.h"

namespace tokenyard::layer_internal {

void ShardCounts::gather(Collectives& collectives, std::int64_t mine) {
  const auto ranks = static_cast<std::size_t>(collectives.world().size());
  counts_.assign(ranks, 1);
  const std::vector<std::int64_t> one_each = counts_;
  collectives.all_gather_v({&mine, Dtype::int64, {1, 1}}, one_each, {counts_.data(), Dtype::int64, {static_cast<std::int64_t>(ranks), 1}});
}

void ShardCounts::slice(int ranks, std::int64_t rows) { counts_ = slice_counts(rows, ranks); }

std::int64_t ShardCounts::total() const { return std::accumulate(counts_.begin(), counts_.end(), std::int64_t{0}); }

std::int64_t ShardCounts::begin(int rank) const { return std::accumulate(counts_.begin(), counts_.begin() + rank, std::int64_t{0}); }

TensorView gather_rows(Collectives& collectives, const ShardCounts& counts, const ConstTensorView& mine, Buffer& memory) {
  const TensorView all = memory.view(mine.dtype, counts.total(), mine.shape[1]);
  collectives.all_gather_v(mine, counts.counts(), all);
  return all;
}

}  // namespace tokenyard::layer_internal
