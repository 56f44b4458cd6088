#include "device/device_tensors.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>

namespace tokenyard::device_test {

DeviceTensors::DeviceTensors(int gpu, std::size_t bytes, CUstream_st* stream)
    : stream_(stream), device_(value_or_throw(make_device_buffer(gpu, bytes))), pinned_(value_or_throw(make_pinned_buffer(bytes))) {}

void DeviceTensors::clear() {
  used_ = 0;
  ranges_.clear();
}

std::size_t DeviceTensors::bytes_of(const ConstTensorView& view) {
  if (view.num_elements() == 0) return 0;
  std::int64_t last = 0;
  for (int d = 0; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
  return static_cast<std::size_t>((last + 1) * size_of(view.dtype));
}

const DeviceTensors::Range* DeviceTensors::find(const ConstTensorView& host) const {
  const auto* const begin = static_cast<const std::byte*>(host.data);
  for (const Range& range : ranges_) {
    if (begin >= range.begin && begin + bytes_of(host) <= range.begin + range.bytes) return &range;
  }
  return nullptr;
}

void DeviceTensors::settle() const { cuda_check(cudaStreamSynchronize(stream_), "waiting for the stream of a test"); }

TensorView DeviceTensors::place(const ConstTensorView& host) {
  TensorView view;
  view.dtype = host.dtype;
  view.ndim = host.ndim;
  view.shape = host.shape;
  view.strides = host.strides;
  const std::size_t bytes = bytes_of(host);
  if (bytes == 0) return view;
  const Range* range = find(host);
  if (range == nullptr) {
    constexpr std::size_t kAlignment = 256;
    if (used_ + bytes > device_.bytes()) throw std::runtime_error("a test needs more device memory than it reserved");
    settle();
    ranges_.push_back({.begin = static_cast<const std::byte*>(host.data), .bytes = bytes, .at = used_});
    range = &ranges_.back();
    std::memcpy(pinned_.data() + used_, host.data, bytes);
    cuda_check(cudaMemcpyAsync(device_.data() + used_, pinned_.data() + used_, bytes, cudaMemcpyHostToDevice, stream_),
               "uploading a tensor");
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    settle();
  }
  view.data = device_.data() + range->at + (static_cast<const std::byte*>(host.data) - range->begin);
  return view;
}

void DeviceTensors::fetch(const TensorView& host) {
  const std::size_t bytes = bytes_of(host);
  if (bytes == 0) return;
  const Range& range = *find(host);
  const std::size_t at = range.at + static_cast<std::size_t>(static_cast<const std::byte*>(host.data) - range.begin);
  settle();
  cuda_check(cudaMemcpyAsync(pinned_.data() + at, device_.data() + at, bytes, cudaMemcpyDeviceToHost, stream_), "downloading a tensor");
  settle();
  std::memcpy(host.data, pinned_.data() + at, bytes);
}

}  // namespace tokenyard::device_test
