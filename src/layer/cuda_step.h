#pragma once
// What a forward on a GPU leaves for its backward, beside the rows that it received.

#include <memory>
#include <vector>

#include "exchange/device_handle.h"
#include "tokenyard/device_routing.h"

namespace tokenyard::layer_internal {

// The memory of a step, in which tensors lie behind each other: first all are placed, then the memory is taken. It is used again.
class StepMemory {
 public:
  void clear() {
    bytes_ = 0;
    parts_.clear();
  }
  void place(TensorView& view, Dtype dtype, std::initializer_list<std::int64_t> shape) {
    constexpr std::int64_t kAlignment = 256;
    view = TensorView(nullptr, dtype, shape);
    parts_.emplace_back(&view, bytes_);
    bytes_ += (view.num_elements() * size_of(dtype) + kAlignment - 1) / kAlignment * kAlignment;
  }
  void take(exchange_internal::BlockPool& blocks, cuda::Stream stream) {
    if (memory_ == nullptr || held_bytes_ < bytes_) {
      memory_.reset();
      memory_ = blocks.take(bytes_, stream);
      held_bytes_ = bytes_;
    }
    exchange_internal::BlockPool::continue_on(memory_, stream);
    for (const auto& [view, at] : parts_) view->data = memory_.get() + at;
  }

 private:
  std::shared_ptr<std::byte> memory_;
  std::int64_t bytes_ = 0, held_bytes_ = 0;
  std::vector<std::pair<TensorView*, std::int64_t>> parts_;
};

// Of a feed-forward of all tokens. P: places, those of this rank's tokens, or of all ranks' with dense_tp.
struct CudaDenseStep {
  TensorView gate_up{};  // [P, 2I]
  TensorView y{};        // [T,H], before the sigmoid: with a gate
  TensorView rows{};     // [P,H], of all ranks: with dense_tp
  TensorView counts{};   // [R] int32, how many each has, and
  TensorView total{};    // [1] int32, all of them
};

// Of a DenseLayer.
struct CudaDenseMemory {
  StepMemory memory;  // of all that follows
  std::int64_t num_tokens = -1;
  CudaDenseStep dense;
};

// Rows of all ranks that share weights: room for A.
struct CudaGathered {
  TensorView rows{};     // [A,H]
  TensorView ids{};      // [A,K] int32: -1 behind the last row
  TensorView weights{};  // [A,K] float32
  TensorView counts{};   // [R] int32
};

struct CudaStep {
  StepMemory memory;  // of all that follows
  std::int64_t num_tokens = -1;
  TensorView logits{};  // [T,E] float32
  DeviceRouting routing{};
  TensorView gate_up{};  // [P, 2I]
  TensorView y{};        // [P,H]: of the experts, before the fold
  CudaGathered gathered;
  CudaDenseStep shared;
};

}  // namespace tokenyard::layer_internal
