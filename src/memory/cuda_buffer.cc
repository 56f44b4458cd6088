#include "memory/cuda_buffer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "memory/cuda_handle.h"

namespace tokenyard {

Failure cuda_failure(cudaError_t error, const std::string& what) {
  cudaGetLastError();
  return {.kind = FailureKind::system,
          .phase = Phase::memory,
          .detail = fmt::format("{}: {} ({})", what, cudaGetErrorString(error), cudaGetErrorName(error))};
}

Expected<CudaEvent> make_cuda_event() {
  cudaEvent_t event = nullptr;
  if (const auto error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming); error != cudaSuccess) {
    return unexpected(cuda_failure(error, "cudaEventCreate"));
  }
  return CudaEvent(event);
}

Expected<CudaStream> make_cuda_stream(int priority) {
  cudaStream_t stream = nullptr;
  if (const auto error = cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority); error != cudaSuccess) {
    return unexpected(cuda_failure(error, fmt::format("cudaStreamCreate with priority {}", priority)));
  }
  return CudaStream(stream);
}

Expected<std::shared_ptr<CUstream_st>> borrow_cuda_stream() {
  // Never destroyed: streams may come back while the process ends.
  static std::mutex& mutex = *new std::mutex;
  static auto& idle = *new std::map<int, std::vector<CudaStream>>;
  int device = 0;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return unexpected(cuda_failure(error, "cudaGetDevice"));
  CudaStream stream;
  {
    const std::lock_guard lock(mutex);
    std::vector<CudaStream>& here = idle[device];
    if (!here.empty()) {
      stream = std::move(here.back());
      here.pop_back();
    }
  }
  if (!stream) {
    auto made = make_cuda_stream();
    if (!made) return unexpected(made.error());
    stream = std::move(*made);
  }
  auto kept = std::make_shared<CudaStream>(std::move(stream));
  return std::shared_ptr<CUstream_st>(kept->get(), [kept, device](CUstream_st*) {
    const std::lock_guard lock(mutex);
    idle[device].push_back(std::move(*kept));
  });
}

CudaDeviceScope::CudaDeviceScope(int device) {
  status_ = cudaGetDevice(&before_);
  if (status_ == cudaSuccess) status_ = cudaSetDevice(device);
}

CudaDeviceScope::~CudaDeviceScope() {
  if (before_ >= 0) cudaSetDevice(before_);
}

Expected<DeviceBuffer> make_device_buffer(int device, std::size_t bytes) {
  const std::string what = fmt::format("cudaMalloc of {} bytes on GPU {}", bytes, device);
  const CudaDeviceScope scope(device);
  if (scope.status() != cudaSuccess) return unexpected(cuda_failure(scope.status(), what));
  void* data = nullptr;
  if (const auto error = cudaMalloc(&data, std::max<std::size_t>(bytes, 1)); error != cudaSuccess) {
    return unexpected(cuda_failure(error, what));
  }
  return DeviceBuffer(data, bytes);
}

Expected<PinnedBuffer> make_pinned_buffer(std::size_t bytes) {
  void* data = nullptr;
  const auto error = cudaHostAlloc(&data, std::max<std::size_t>(bytes, 1), cudaHostAllocPortable | cudaHostAllocMapped);
  if (error != cudaSuccess) return unexpected(cuda_failure(error, fmt::format("cudaHostAlloc of {} bytes", bytes)));
  std::memset(data, 0, bytes);
  return PinnedBuffer(data, bytes);
}

}  // namespace tokenyard
