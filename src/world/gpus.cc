#include "world/gpus.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <array>

namespace tokenyard {
namespace {

int count_gpus(cudaError_t* error) {
  int count = 0;
  *error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  return *error == cudaSuccess ? count : 0;
}

Gpu look_at(int device) {
  Gpu gpu;
  cudaDeviceProp properties = {};
  std::array<char, 32> bus = {};
  if (cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
    gpu.name = properties.name;
    gpu.compute_capability = properties.major * 10 + properties.minor;
    gpu.num_sms = properties.multiProcessorCount;
    gpu.memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem);
  }
  if (cudaDeviceGetPCIBusId(bus.data(), static_cast<int>(bus.size()), device) == cudaSuccess) gpu.bus_id = bus.data();
  cudaGetLastError();
  return gpu;
}

}  // namespace

GpuTopology gpu_topology() {
  cudaError_t error = cudaSuccess;
  const int count = count_gpus(&error);
  GpuTopology topology;
  for (int gpu = 0; gpu < count; ++gpu) {
    topology.gpus.push_back(look_at(gpu));
    std::vector<bool>& access = topology.peer_access.emplace_back();
    for (int peer = 0; peer < count; ++peer) {
      int can = 1;
      if (peer != gpu && cudaDeviceCanAccessPeer(&can, gpu, peer) != cudaSuccess) can = 0;
      access.push_back(can != 0);
    }
  }
  return topology;
}

Backend cuda_peer_backend() {
  Backend backend{.name = "cuda_peer", .kind = "memory"};
  cudaError_t error = cudaSuccess;
  if (count_gpus(&error) > 0) return backend;
  int driver = 0;
  int runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const auto version = [](int number) { return fmt::format("{}.{}", number / 1000, number % 1000 / 10); };
  backend.availability = Availability::not_usable;
  backend.reason = fmt::format("cudaGetDeviceCount: {}", error == cudaSuccess ? "no GPU" : cudaGetErrorString(error));
  if (driver == 0) {
    backend.remedy = fmt::format("install an NVIDIA driver for CUDA {} or newer; in a container, start it with the GPUs", version(runtime));
  } else if (driver < runtime && driver / 1000 < runtime / 1000) {
    backend.remedy = fmt::format("update the NVIDIA driver: it is for CUDA {}, this build needs {}.0", version(driver), runtime / 1000);
  } else {
    backend.remedy = "make GPUs visible: CUDA_VISIBLE_DEVICES, the container's devices, nvidia-smi";
  }
  return backend;
}

}  // namespace tokenyard
