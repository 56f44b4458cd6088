#pragma once
// The memory on a GPU in which the layers of a group take turns: as much as the group's largest step needs, there before the first one, so
// that no step allocates, and graphs find it where it was.

#include "exchange/cuda_trace.h"
#include "exchange/device_handle.h"
#include "layer/cuda_step.h"
#include "layer/moe_engine.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_stream.h"
#include "tokenyard/device_experts.h"
#include "tokenyard/device_routing.h"
#include "tokenyard/layer.h"

namespace tokenyard::layer_internal {

class DeviceWorkspace {
 public:
  // `exchange` may be nullptr. shards: ranks that experts are cut over and rows gathered, or 1.
  DeviceWorkspace(const ExpertGroupOptions& options, const Exchange* exchange, int shards);

  int device() const { return device_; }
  int multiprocessors() const { return multiprocessors_; }
  std::int64_t max_places() const { return places_count_; }
  DeviceExperts& experts() { return experts_; }
  // The group's calls run one after the other, whatever their streams.
  CallOrder& order() { return order_; }
  exchange_internal::CudaTrace& trace() { return is_quiet_ ? quiet_ : trace_; }
  // What is enqueued from now on is no phase of anybody's step, or is again.
  void set_quiet(bool is_quiet) { is_quiet_ = is_quiet; }

  // Dense, within the group's sizes; each is there once.
  TensorView logits(std::int64_t tokens, std::int64_t experts) const { return {logits_.data(), Dtype::float32, {tokens, experts}}; }
  DeviceRouting routing(std::int64_t tokens, std::int64_t experts, std::int64_t top_k) const;
  float* gate_parts() const { return gate_parts_.as<float>(); }
  TensorView places(Dtype dtype, std::int64_t places, std::int64_t columns) const { return {places_.data(), dtype, {places, columns}}; }
  TensorView shared(Dtype dtype, std::int64_t tokens, std::int64_t columns) const { return {shared_.data(), dtype, {tokens, columns}}; }
  TensorView sums(Dtype dtype, std::int64_t tokens, std::int64_t columns) const { return {sums_.data(), dtype, {tokens, columns}}; }

  // Of rows that the ranks of dense_tp gather: P of all of them, how many each has, and all of them have.
  struct Dense {
    DeviceBuffer gathered_rows, partial_rows;  // [P,H]
    DeviceBuffer numbers;                      // int32: [R] and [1]
    std::int64_t ranks = 0;
    TensorView gathered(Dtype dtype, std::int64_t rows, std::int64_t columns) const {
      return {gathered_rows.data(), dtype, {rows, columns}};
    }
    TensorView partial(Dtype dtype, std::int64_t rows, std::int64_t columns) const { return {partial_rows.data(), dtype, {rows, columns}}; }
    TensorView counts() const { return {numbers.data(), Dtype::int32, {ranks}}; }
    TensorView total() const { return {numbers.as<std::int32_t>() + ranks, Dtype::int32, {1}}; }
  };
  const Dense& dense() const { return dense_; }

  // Where shards of experts meet: rows of all of them, and partial sums. With same_tokens all have the same rows, and only gradients are
  // gathered.
  struct Shards {
    std::int64_t count = 1;
    std::int64_t most_of_all = 0;  // A
    DeviceBuffer rows, partial;    // [A,H]
    DeviceBuffer ids, weights;     // [A,K]
    DeviceBuffer counts;           // [count] int32
    DeviceBuffer own_weights;      // [rows of one, K] float32, with gradients
  };
  const Shards& shards() const { return shards_; }
  CudaGathered gathered(Dtype dtype, std::int64_t columns, std::int64_t top_k) const;
  TensorView partial(Dtype dtype, std::int64_t rows, std::int64_t columns) const {
    return {shards_.partial.data(), dtype, {rows, columns}};
  }

  // For backward, where the group was made with gradients.
  struct Gradients {
    DeviceBuffer places;         // [P,H]
    DeviceBuffer place_weights;  // [P] float32
    DeviceBuffer rows, y;        // [M,H]
    DeviceBuffer of_gate;        // [M,H] float32
    DeviceBuffer logits;         // [M,E] float32
    DeviceBuffer weights;        // [M,K] float32
    DeviceBuffer shared_logits;  // [M] float32
  };
  const Gradients& gradients() const { return gradients_; }
  // Memory of steps under way.
  exchange_internal::BlockPool& blocks() { return *blocks_; }

  // A number up to the most tokens: [1,1] int32.
  ConstTensorView number(std::int64_t tokens) const { return {numbers_.as<std::int32_t>() + tokens, Dtype::int32, {1, 1}}; }
  // One group of the first rows, of as many as the device knows.
  DeviceRowGroups first_rows(const ConstTensorView& count, std::int64_t places) const;
  // One group of the rows [0, tokens).
  DeviceRowGroups all_rows(std::int64_t tokens) const;
  // Room for `places`, and nothing in it.
  DeviceRowGroups no_rows(std::int64_t places, int num_groups) const;

 private:
  void make_shards(const ExpertGroupOptions& options, std::int64_t most, int count);

  int device_;
  int multiprocessors_;
  std::int64_t places_count_;
  DeviceExperts experts_;
  CallOrder order_;
  exchange_internal::CudaTrace trace_, quiet_{false};
  bool is_quiet_ = false;
  DeviceBuffer logits_, ids_, weights_, load_, gate_parts_, places_, shared_, sums_;
  Dense dense_;
  Shards shards_;
  Gradients gradients_;
  std::shared_ptr<exchange_internal::BlockPool> blocks_;
  DeviceBuffer numbers_;  // int32: 0, 1, .. max_tokens, so that a step's count is there already
  DeviceBuffer zeros_;    // int32 [num_experts]
};

}  // namespace tokenyard::layer_internal
