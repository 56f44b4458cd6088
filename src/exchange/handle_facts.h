#pragma once
// What Handle and Received show of a dispatch, whichever engine made it.

#include <cstdint>
#include <span>
#include <vector>

#include "tokenyard/options.h"

namespace tokenyard::exchange_internal {

// The tensors of Received beside rows and scales; those a layout does not have are absent. In the memory of the engine's device.
struct ReceivedViews {
  ConstTensorView num_rows;  // [1] int32, cuda only: what Received::num_rows would say
  ConstTensorView local_ids;
  ConstTensorView row_weights;
  ConstTensorView source_rank;
  ConstTensorView source_token;
  ConstTensorView source_k;
  ConstTensorView expert_counts;
  ConstTensorView expert_offsets;
  ConstTensorView expert_rows;
  ConstTensorView rank_counts;
  ConstTensorView sent_counts;
  ConstTensorView ranges;
  ConstTensorView present;
};

// A dense tensor of up to four dimensions.
inline ConstTensorView dense_view(const void* data, Dtype dtype, const std::vector<std::int64_t>& shape) {
  ConstTensorView view;
  view.data = data;
  view.dtype = dtype;
  view.ndim = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.shape[d] = shape[d];
    view.strides[d] = stride;
    stride *= shape[d];
  }
  return view;
}

struct HandleFacts {
  std::uint64_t exchange_id = 0;  // of this process: a handle works on the exchange that made it
  std::uint64_t call = 0;         // equal on all ranks: names this handle in later messages
  int placement = 0;
  std::uint64_t placement_hash = 0;
  Layout layout = Layout::token_major;
  Mode mode = Mode::throughput;
  void* stream = nullptr;  // cuda: the cudaStream_t of the dispatch

  virtual ~HandleFacts() = default;
  virtual int top_k() const = 0;
  virtual std::int64_t num_tokens() const = 0;                      // T
  virtual std::int64_t num_token_rows() const = 0;                  // N; -1: only the device knows
  virtual std::int64_t num_rows() const = 0;                        // what Received::num_rows says; -1: only the device knows
  virtual const std::vector<std::int64_t>& rows_shape() const = 0;  // of Received::rows without H
  virtual std::span<const std::int64_t> dropped() const = 0;        // [L]
  virtual ReceivedViews views() const = 0;

  bool is_expert_layout() const { return layout == Layout::expert_major || layout == Layout::expert_padded; }
  std::int64_t total_rows() const {
    std::int64_t rows = 1;
    for (const std::int64_t size : rows_shape()) rows *= size;
    return rows;
  }
};

}  // namespace tokenyard::exchange_internal
