#pragma once
// What measurements on GPUs share: events that tell the time, and a gate in the stream.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "tokenyard/world.h"

namespace tokenyard::cli {

// Holds a stream back until the host says go, so that what is enqueued behind it runs without gaps.
class StreamGate {
 public:
  explicit StreamGate(cudaStream_t stream) : stream_(stream), word_(value_or_throw(make_pinned_buffer(sizeof(std::uint32_t)))) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    cuda_check(cudaGetDriverEntryPointByVersion("cuStreamWaitValue32", &found, 11070, cudaEnableDefault, &result), "cuStreamWaitValue32");
    wait_ = reinterpret_cast<decltype(&cuStreamWaitValue32)>(found);
  }
  void close() {
    ++turn_;
    if (wait_(stream_, reinterpret_cast<CUdeviceptr>(word_.data()), turn_, CU_STREAM_WAIT_VALUE_GEQ) != CUDA_SUCCESS)
      throw Error("cuStreamWaitValue32 failed; this driver has no stream memory operations");
  }
  void open() { std::atomic_ref<std::uint32_t>(*word_.as<std::uint32_t>()).store(turn_); }

 private:
  cudaStream_t stream_;
  PinnedBuffer word_;
  decltype(&cuStreamWaitValue32) wait_ = nullptr;
  std::uint32_t turn_ = 0;
};

using TimedEvent = CudaHandle<cudaEvent_t, cudaEventDestroy>;
inline TimedEvent timed_event() {
  cudaEvent_t event = nullptr;
  cuda_check(cudaEventCreate(&event), "cudaEventCreate");
  return TimedEvent(event);
}

// Makes this rank's GPU current.
inline int device_of(const World& world) {
  int devices = 0;
  cuda_check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  const int device = world.local_rank() % std::max(devices, 1);
  cuda_check(cudaSetDevice(device), "cudaSetDevice");
  return device;
}

}  // namespace tokenyard::cli
