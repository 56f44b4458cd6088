#include "device/gpus.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "memory/cuda_error.h"
#include "memory/cuda_handle.h"
#include "tokenyard/topo.h"

namespace tokenyard::device_test {
namespace {

// Kernels of rank threads wait for each other on one GPU: streams that shared a hardware queue would never let the later one begin.
// Read when CUDA starts, which no test has done yet.
class ManyQueues : public testing::Environment {
 public:
  ManyQueues() { setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0); }
};
const testing::Environment* const kManyQueues = testing::AddGlobalTestEnvironment(new ManyQueues);  // owned by gtest

constexpr int kMostSms = 16;

}  // namespace

int gpu_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

int use_gpu_of(int rank) {
  const int gpu = rank % gpu_count();
  cuda_check(cudaSetDevice(gpu), "cudaSetDevice");
  return gpu;
}

int sm_budget_of(int gpu, int ranks) {
  int sms = 0;
  cuda_check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, gpu), "cudaDeviceGetAttribute");
  const int sharers = (ranks + gpu_count() - 1) / gpu_count();
  return std::clamp(sms / sharers, 1, kMostSms);
}

std::string why_not(const std::string& backend) {
  for (const Backend& known : backends()) {
    if (known.name != backend) continue;
    return known.availability == Availability::available ? "" : known.reason + "; " + known.remedy;
  }
  return "tokenyard topo knows no " + backend;
}

std::size_t open_descriptors() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

std::size_t free_on_all_gpus() {
  std::size_t sum = 0;
  for (int gpu = 0; gpu < gpu_count(); ++gpu) {
    const CudaDeviceScope scope(gpu);
    std::size_t free = 0;
    std::size_t total = 0;
    cuda_check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    sum += free;
  }
  return sum;
}

}  // namespace tokenyard::device_test
