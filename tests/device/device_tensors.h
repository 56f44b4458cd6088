#pragma once
// Tensors of the host brought to a GPU and back, gaps between rows included, in memory that is there before any kernel waits: an
// allocation in between may wait for kernels of ranks that share the GPU.

#include <cstddef>
#include <vector>

#include "memory/cuda_buffer.h"
#include "tokenyard/tensor_view.h"

struct CUstream_st;

namespace tokenyard::device_test {

class DeviceTensors {
 public:
  DeviceTensors(int gpu, std::size_t bytes, CUstream_st* stream);

  // Forgets all tensors.
  void clear();
  // The tensor on the GPU. A tensor that lies within one that was placed before stays part of it.
  TensorView place(const ConstTensorView& host);
  // Waits for the stream; then the host has what the GPU holds of `host`, which was placed.
  void fetch(const TensorView& host);

 private:
  struct Range {
    const std::byte* begin;
    std::size_t bytes;
    std::size_t at;  // in both memories
  };
  static std::size_t bytes_of(const ConstTensorView& view);
  const Range* find(const ConstTensorView& host) const;
  void settle() const;

  CUstream_st* stream_;
  DeviceBuffer device_;
  PinnedBuffer pinned_;
  std::size_t used_ = 0;
  std::vector<Range> ranges_;
};

}  // namespace tokenyard::device_test
