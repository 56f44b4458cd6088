#pragma once
// The ranks that share weights by tensor parallelism: their rows gathered, their partial sums reduced and scattered.

#include <span>
#include <vector>

#include "layer/buffer.h"
#include "tokenyard/collective.h"

namespace tokenyard::layer_internal {

// Rows [begin, begin + count) of those that all ranks have.
struct Slice {
  std::int64_t begin = 0;
  std::int64_t count = 0;
};

// Who has how many rows in one step. The ranks have each their own rows, or all the same ones, of which each owns a slice.
class ShardCounts {
 public:
  // Collective: rows are each rank's own.
  void gather(Collectives& collectives, std::int64_t mine);
  // All ranks have the same rows.
  void slice(int ranks, std::int64_t rows);

  std::span<const std::int64_t> counts() const { return counts_; }
  std::int64_t total() const;
  // The first row of a rank.
  std::int64_t begin(int rank) const;
  std::int64_t of(int rank) const { return counts_[static_cast<std::size_t>(rank)]; }
  Slice slice_of(int rank) const { return {begin(rank), of(rank)}; }

 private:
  std::vector<std::int64_t> counts_;
};

// Every rank's rows, in rank order, in `memory`.
TensorView gather_rows(Collectives& collectives, const ShardCounts& counts, const ConstTensorView& mine, Buffer& memory);

}  // namespace tokenyard::layer_internal
