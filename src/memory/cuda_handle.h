#pragma once
// CUDA's handles with one owner, and the current device for the length of a scope.

#include <cuda_runtime_api.h>

#include <memory>
#include <utility>

#include "memory/cuda_error.h"

namespace tokenyard {

template <class T, cudaError_t (*kDestroy)(T)>
class CudaHandle {
 public:
  CudaHandle() = default;
  explicit CudaHandle(T handle) : handle_(handle) {}
  CudaHandle(CudaHandle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  CudaHandle& operator=(CudaHandle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~CudaHandle() {
    if (handle_ != nullptr) kDestroy(handle_);
  }
  T get() const { return handle_; }
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  T handle_ = nullptr;
};

using CudaEvent = CudaHandle<cudaEvent_t, cudaEventDestroy>;
using CudaStream = CudaHandle<cudaStream_t, cudaStreamDestroy>;

// Without timing, which costs; not shared between processes.
Expected<CudaEvent> make_cuda_event();
// Of the current device; does not wait for the legacy default stream.
Expected<CudaStream> make_cuda_stream(int priority = 0);

// A stream of the current device that comes back here with its last owner, and is then used again. A GPU has few hardware queues;
// streams that share one run in order, and kernels that wait for each other across ranks would then never meet.
Expected<std::shared_ptr<CUstream_st>> borrow_cuda_stream();

// Makes a device current; the one before comes back at the end. Creates its context, which later calls rely on.
class CudaDeviceScope {
 public:
  explicit CudaDeviceScope(int device);
  ~CudaDeviceScope();
  CudaDeviceScope(const CudaDeviceScope&) = delete;
  CudaDeviceScope& operator=(const CudaDeviceScope&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int before_ = -1;
  cudaError_t status_;
};

}  // namespace tokenyard
