#pragma once
// Memory for one owner: on a device, or pinned on the host at an address that devices use, too.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "memory/cuda_error.h"

namespace tokenyard {

// Frees with `kFree`.
template <cudaError_t (*kFree)(void*)>
class CudaBuffer {
 public:
  CudaBuffer() = default;
  CudaBuffer(void* data, std::size_t bytes) : data_(static_cast<std::byte*>(data)), bytes_(bytes) {}
  CudaBuffer(CudaBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  CudaBuffer& operator=(CudaBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~CudaBuffer() {
    if (data_ != nullptr) kFree(data_);
  }
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

using DeviceBuffer = CudaBuffer<cudaFree>;
using PinnedBuffer = CudaBuffer<cudaFreeHost>;

// Not cleared. Never empty: no bytes are one byte. May wait for kernels on the device, so not while one waits for a peer.
Expected<DeviceBuffer> make_device_buffer(int device, std::size_t bytes);
// Zero-filled, valid on every device (portable and mapped).
Expected<PinnedBuffer> make_pinned_buffer(std::size_t bytes);

}  // namespace tokenyard
