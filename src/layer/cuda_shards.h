#pragma once
// The ranks that share weights by tensor parallelism, on GPUs: their rows gathered, their partial sums reduced and scattered. Counts stay
// on the device where each rank has rows of its own.

#include <span>
#include <string>
#include <vector>

#include "tokenyard/collective.h"

namespace tokenyard::layer_internal {

class CudaShards {
 public:
  // most: rows of a rank in a step.
  CudaShards(DeviceCollectives& ranks, std::int64_t most)
      : ranks_(ranks), most_(most), ones_(static_cast<std::size_t>(ranks.world().size()), 1) {}

  int size() const { return ranks_.world().size(); }
  int rank() const { return ranks_.world().rank(); }
  std::int64_t most_of_all() const { return size() * most_; }

  // From here on, peers in the step wait for so many calls of this rank: until they are made, or leave() tells them why they will not be.
  void begin(int calls) { owed_ = calls; }
  void leave(const std::string& reason, void* stream);

  // mine [1,1] int32, counts [R] int32: how many rows each rank has in the calls that follow.
  void gather_counts(const ConstTensorView& mine, const TensorView& counts, void* stream);
  void gather(const ConstTensorView& mine, const ConstTensorView& counts, const TensorView& all, void* stream);
  void reduce(const ConstTensorView& all, const ConstTensorView& counts, const TensorView& mine, void* stream);
  // By counts that the host knows.
  void gather(const ConstTensorView& mine, std::span<const std::int64_t> counts, const TensorView& all, void* stream);
  void reduce(const ConstTensorView& all, std::span<const std::int64_t> counts, const TensorView& mine, void* stream);

 private:
  DeviceCollectives& ranks_;
  std::int64_t most_;
  std::vector<std::int64_t> ones_;  // [R]
  int owed_ = 0;
};

}  // namespace tokenyard::layer_internal
