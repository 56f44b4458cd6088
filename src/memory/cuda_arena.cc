#include "memory/cuda_arena.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "memory/cuda_driver.h"
#include "memory/cuda_error.h"
#include "memory/cuda_handle.h"

namespace tokenyard {
namespace {

constexpr std::size_t kGranularity = std::size_t{2} << 20;

CUmemAllocationProp allocation_properties(int device, bool exported) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
  properties.requestedHandleTypes = exported ? CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR : CU_MEM_HANDLE_TYPE_NONE;
  return properties;
}

// Physical memory with one owner. Mappings and other processes hold it, too.
class Allocation {
 public:
  Allocation(const CudaDriver& driver, CUmemGenericAllocationHandle handle) : driver_(driver), handle_(handle) {}
  ~Allocation() { driver_.mem_release(handle_); }
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  CUmemGenericAllocationHandle get() const { return handle_; }

 private:
  const CudaDriver& driver_;
  CUmemGenericAllocationHandle handle_;
};

// A range of addresses with memory behind it, until it goes.
struct MappedRange {
  const CudaDriver& driver;
  CUdeviceptr address = 0;
  std::size_t bytes = 0;
  bool mapped = false;
  ~MappedRange() {
    if (mapped) driver.mem_unmap(address, bytes);
    if (address != 0) driver.mem_address_free(address, bytes);
  }
};

Expected<CudaArena> map_allocation(const CudaDriver& driver, const Allocation& allocation, std::size_t bytes,
                                   std::span<const int> readers) {
  auto range = std::make_shared<MappedRange>(MappedRange{.driver = driver});
  auto done = cuda_result(driver.mem_address_reserve(&range->address, bytes, kGranularity, 0, 0),
                          fmt::format("cuMemAddressReserve of {} bytes", bytes));
  if (!done) return unexpected(std::move(done.error()));
  range->bytes = bytes;
  done = cuda_result(driver.mem_map(range->address, bytes, 0, allocation.get(), 0), fmt::format("cuMemMap of {} bytes", bytes));
  if (!done) return unexpected(std::move(done.error()));
  range->mapped = true;
  for (const int reader : readers) {
    const CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = reader},
                                    .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    done = cuda_result(driver.mem_set_access(range->address, bytes, &access, 1), "cuMemSetAccess for " + describe_gpu(reader));
    if (!done) return unexpected(std::move(done.error()));
  }
  return CudaArena(range, reinterpret_cast<std::byte*>(range->address));
}

std::string free_memory() {
  std::size_t free = 0;
  std::size_t total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) return {};
  return fmt::format("; {} of {} bytes are free there", free, total);
}

}  // namespace

std::string describe_gpu(int device) {
  cudaDeviceProp properties = {};
  std::array<char, 32> bus = {};
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess ||
      cudaDeviceGetPCIBusId(bus.data(), static_cast<int>(bus.size()), device) != cudaSuccess) {
    cudaGetLastError();
    return fmt::format("GPU {}", device);
  }
  return fmt::format("GPU {} ({}, {})", device, properties.name, bus.data());
}

Expected<std::size_t> cuda_arena_bytes(int device, std::size_t bytes) {
  std::size_t granularity = kGranularity;
  if (virtual_objection(device, false).empty()) {
    const auto driver = cuda_driver();
    const CUmemAllocationProp properties = allocation_properties(device, false);
    std::size_t minimum = 0;
    const CUresult error = (*driver)->mem_get_allocation_granularity(&minimum, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    if (error != CUDA_SUCCESS) return unexpected(cuda_failure(error, "cuMemGetAllocationGranularity of " + describe_gpu(device)));
    granularity = std::max(granularity, minimum);
  }
  cudaDeviceProp properties = {};
  if (const auto error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) {
    return unexpected(cuda_failure(error, fmt::format("cudaGetDeviceProperties of GPU {}", device)));
  }
  if (bytes > properties.totalGlobalMem) {
    return unexpected({.kind = FailureKind::system,
                       .phase = Phase::memory,
                       .detail = fmt::format("an arena of {} bytes on {} with {} bytes of memory; lower max_tokens_per_rank, receive_rows "
                                             "or depth (Exchange::memory_plan shows what takes how much)",
                                             bytes, describe_gpu(device), properties.totalGlobalMem)});
  }
  return std::max<std::size_t>(1, (bytes + granularity - 1) / granularity) * granularity;
}

std::string virtual_objection(int device, bool exported) {
  const auto driver = cuda_driver();
  if (!driver) return driver.error().detail;
  const auto supports = [&](CUdevice_attribute attribute) {
    int value = 0;
    return (*driver)->device_get_attribute(&value, attribute, device) == CUDA_SUCCESS && value != 0;
  };
  if (!supports(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)) return describe_gpu(device) + " has no virtual memory management";
  if (exported && !supports(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)) {
    return describe_gpu(device) + " cannot export memory as a file descriptor here";
  }
  return {};
}

Expected<VirtualArena> allocate_virtual(int device, std::size_t bytes, std::span<const int> readers, bool exported) {
  const auto driver = cuda_driver();
  if (!driver) return unexpected(driver.error());
  const CudaDeviceScope scope(device);
  if (scope.status() != cudaSuccess) return unexpected(cuda_failure(scope.status(), fmt::format("cudaSetDevice({})", device)));
  const CUmemAllocationProp properties = allocation_properties(device, exported);
  CUmemGenericAllocationHandle handle = 0;
  if (const CUresult error = (*driver)->mem_create(&handle, bytes, &properties, 0); error != CUDA_SUCCESS) {
    return unexpected(cuda_failure(error, fmt::format("cuMemCreate of {} bytes on {}{}", bytes, describe_gpu(device), free_memory())));
  }
  const Allocation allocation(**driver, handle);
  VirtualArena made;
  if (exported) {
    int descriptor = -1;
    const CUresult error = (*driver)->mem_export_to_shareable_handle(&descriptor, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (error != CUDA_SUCCESS) return unexpected(cuda_failure(error, "cuMemExportToShareableHandle on " + describe_gpu(device)));
    made.descriptor = world_internal::Fd(descriptor);
  }
  auto arena = map_allocation(**driver, allocation, bytes, readers);
  if (!arena) return unexpected(std::move(arena.error()));
  made.arena = std::move(*arena);
  return made;
}

Expected<CudaArena> import_virtual(int descriptor, std::size_t bytes, int reader) {
  const auto driver = cuda_driver();
  if (!driver) return unexpected(driver.error());
  const CudaDeviceScope scope(reader);
  if (scope.status() != cudaSuccess) return unexpected(cuda_failure(scope.status(), fmt::format("cudaSetDevice({})", reader)));
  CUmemGenericAllocationHandle handle = 0;
  void* shared = reinterpret_cast<void*>(static_cast<std::uintptr_t>(descriptor));  // as the interface wants it
  const CUresult error = (*driver)->mem_import_from_shareable_handle(&handle, shared, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  if (error != CUDA_SUCCESS) return unexpected(cuda_failure(error, "cuMemImportFromShareableHandle"));
  const Allocation allocation(**driver, handle);
  return map_allocation(**driver, allocation, bytes, std::array{reader});
}

Expected<CudaArena> allocate_plain(int device, std::size_t bytes) {
  const CudaDeviceScope scope(device);
  if (scope.status() != cudaSuccess) return unexpected(cuda_failure(scope.status(), fmt::format("cudaSetDevice({})", device)));
  void* data = nullptr;
  if (const auto error = cudaMalloc(&data, bytes); error != cudaSuccess) {
    return unexpected(cuda_failure(error, fmt::format("cudaMalloc of {} bytes on {}{}", bytes, describe_gpu(device), free_memory())));
  }
  return CudaArena(static_cast<std::byte*>(data), [](std::byte* memory) { cudaFree(memory); });
}

Expected<void> enable_peer_access(int reader, int device) {
  const CudaDeviceScope scope(reader);
  if (scope.status() != cudaSuccess) return unexpected(cuda_failure(scope.status(), fmt::format("cudaSetDevice({})", reader)));
  const cudaError_t error = cudaDeviceEnablePeerAccess(device, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    return {};
  }
  return cuda_result(error, fmt::format("cudaDeviceEnablePeerAccess from {} to {}", describe_gpu(reader), describe_gpu(device)));
}

Expected<std::string> export_ipc(int device, const CudaArena& arena) {
  const CudaDeviceScope scope(device);
  cudaIpcMemHandle_t handle = {};
  if (const auto error = cudaIpcGetMemHandle(&handle, arena.get()); error != cudaSuccess) {
    return unexpected(cuda_failure(error, "cudaIpcGetMemHandle on " + describe_gpu(device)));
  }
  return std::string(reinterpret_cast<const char*>(&handle), sizeof handle);
}

Expected<CudaArena> import_ipc(const std::string& handle, int reader) {
  cudaIpcMemHandle_t opaque = {};
  if (handle.size() != sizeof opaque) {
    return unexpected({.kind = FailureKind::mismatch, .phase = Phase::memory, .detail = "its IPC handle is malformed"});
  }
  std::memcpy(&opaque, handle.data(), sizeof opaque);
  const CudaDeviceScope scope(reader);
  void* data = nullptr;
  if (const auto error = cudaIpcOpenMemHandle(&data, opaque, cudaIpcMemLazyEnablePeerAccess); error != cudaSuccess) {
    return unexpected(cuda_failure(error, "cudaIpcOpenMemHandle on " + describe_gpu(reader)));
  }
  return CudaArena(static_cast<std::byte*>(data), [reader](std::byte* memory) {
    const CudaDeviceScope of_reader(reader);
    cudaIpcCloseMemHandle(memory);
  });
}

Expected<void> clear_arena(int device, const CudaArena& arena, std::size_t bytes, Deadline deadline) {
  const CudaDeviceScope scope(device);
  if (scope.status() != cudaSuccess) return unexpected(cuda_failure(scope.status(), fmt::format("cudaSetDevice({})", device)));
  const auto stream = borrow_cuda_stream();
  if (!stream) return unexpected(stream.error());
  if (auto started = cuda_result(cudaMemsetAsync(arena.get(), 0, bytes, stream->get()), "cudaMemset"); !started) return started;
  cudaError_t state = cudaErrorNotReady;
  while ((state = cudaStreamQuery(stream->get())) == cudaErrorNotReady) {
    if (deadline.expired()) {
      return unexpected(
          {.kind = FailureKind::timeout,
           .phase = Phase::memory,
           .detail = fmt::format("{} did not clear {} bytes within {} ms", describe_gpu(device), bytes, deadline.timeout_ms())});
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  cudaGetLastError();  // "not ready" is not one
  return cuda_result(state, fmt::format("clearing {} bytes of {}", bytes, describe_gpu(device)));
}

}  // namespace tokenyard
