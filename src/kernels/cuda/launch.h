#pragma once
// How kernels are started whose blocks may wait for each other, and which device can do what.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace tokenyard::cuda {

// Whether the current device has bulk copies and mbarriers.
inline bool has_bulk_copies() {
  constexpr int kHopper = 9;
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= kHopper;
}

// Of dynamic shared memory that a block of the current device may have, beside a little static memory.
inline std::int64_t most_shared_bytes() {
  constexpr std::int64_t kStatic = 4096;
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return bytes - kStatic;
}

// together: all blocks are resident at once, or none is (a cooperative launch). early: they may be before the kernel in front of this one
// has ended (a programmatic launch, compute capability 9.0).
enum class Resident { any, together, early };

class Launch {
 public:
  Launch(int blocks, int threads, std::size_t shared_bytes, cudaStream_t stream, Resident resident) {
    config_.gridDim = dim3(static_cast<unsigned>(blocks));
    config_.blockDim = dim3(static_cast<unsigned>(threads));
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    if (resident == Resident::early) {
      attribute_.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute_.val.programmaticStreamSerializationAllowed = 1;
    } else {
      attribute_.id = cudaLaunchAttributeCooperative;
      attribute_.val.cooperative = 1;
    }
    config_.attrs = &attribute_;
    config_.numAttrs = resident == Resident::any ? 0 : 1;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  // A failed launch is the runtime's last error, which the caller asks for.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), Arguments&&... arguments) const {
    static_cast<void>(cudaLaunchKernelEx(&config_, kernel, static_cast<Arguments&&>(arguments)...));
  }

 private:
  cudaLaunchAttribute attribute_ = {};
  cudaLaunchConfig_t config_ = {};
};

}  // namespace tokenyard::cuda
