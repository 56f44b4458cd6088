#include "device/hold.h"

#include <cuda_runtime.h>

#include "kernels/cuda/ptx.cuh"

namespace tokenyard::device_test {
namespace {

constexpr int kThreads = 1024;

__global__ void hold(const std::uint32_t* word, std::uint64_t longest_ns) {
  const std::uint64_t begin = cuda::ptx::global_timer_ns();
  while (cuda::ptx::load_relaxed(word) == 0 && cuda::ptx::global_timer_ns() - begin < longest_ns) {
  }
}

__global__ void __launch_bounds__(kThreads) fill(std::uint64_t ns) {
  const std::uint64_t begin = cuda::ptx::global_timer_ns();
  while (cuda::ptx::global_timer_ns() - begin < ns) {
  }
}

}  // namespace

void load_hold() {
  cudaFuncAttributes attributes = {};
  cudaFuncGetAttributes(&attributes, hold);
  cudaFuncGetAttributes(&attributes, fill);
}

void launch_hold(const std::uint32_t* word, std::uint64_t longest_ns, CUstream_st* stream) { hold<<<1, 1, 0, stream>>>(word, longest_ns); }

void launch_fill(std::uint64_t ns, CUstream_st* stream) {
  int device = 0;
  int multiprocessors = 0;
  int resident = 0;  // blocks of a multiprocessor
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, fill, kThreads, 0);
  fill<<<2 * resident * multiprocessors, kThreads, 0, stream>>>(ns);
}

}  // namespace tokenyard::device_test
