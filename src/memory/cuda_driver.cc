#include "memory/cuda_driver.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "memory/cuda_error.h"

namespace tokenyard {
namespace {

// All of them are in every driver that runs this version of CUDA.
constexpr unsigned int kVersion = 12000;

cudaError_t entry_point(const char* symbol, void** function, cudaDriverEntryPointQueryResult* found) {
#if CUDART_VERSION >= 12050
  return cudaGetDriverEntryPointByVersion(symbol, function, kVersion, cudaEnableDefault, found);
#else
  return cudaGetDriverEntryPoint(symbol, function, cudaEnableDefault, found);
#endif
}

template <class Function>
void load(const char* symbol, Function& function, Expected<CudaDriver>& driver) {
  if (!driver) return;
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = entry_point(symbol, &address, &found);
  if (error != cudaSuccess) {
    driver = unexpected(cuda_failure(error, fmt::format("{} of the CUDA driver", symbol)));
  } else if (found != cudaDriverEntryPointSuccess || address == nullptr) {
    driver = unexpected({.kind = FailureKind::system,
                         .phase = Phase::memory,
                         .detail = fmt::format("the CUDA driver has no {}; update it to one for CUDA 12.4 or newer", symbol)});
  } else {
    function = reinterpret_cast<Function>(address);
  }
}

Expected<CudaDriver> load_driver() {
  CudaDriver calls;
  Expected<CudaDriver> driver = CudaDriver();
  load("cuDeviceGetAttribute", calls.device_get_attribute, driver);
  load("cuGetErrorName", calls.get_error_name, driver);
  load("cuMemGetAllocationGranularity", calls.mem_get_allocation_granularity, driver);
  load("cuMemCreate", calls.mem_create, driver);
  load("cuMemRelease", calls.mem_release, driver);
  load("cuMemAddressReserve", calls.mem_address_reserve, driver);
  load("cuMemAddressFree", calls.mem_address_free, driver);
  load("cuMemMap", calls.mem_map, driver);
  load("cuMemUnmap", calls.mem_unmap, driver);
  load("cuMemSetAccess", calls.mem_set_access, driver);
  load("cuMemExportToShareableHandle", calls.mem_export_to_shareable_handle, driver);
  load("cuMemImportFromShareableHandle", calls.mem_import_from_shareable_handle, driver);
  if (driver) driver = calls;
  return driver;
}

}  // namespace

Expected<const CudaDriver*> cuda_driver() {
  static const Expected<CudaDriver> driver = load_driver();
  if (!driver) return unexpected(driver.error());
  return &*driver;
}

Failure cuda_failure(CUresult error, const std::string& what) {
  const char* text = nullptr;
  if (const auto driver = cuda_driver()) (*driver)->get_error_name(error, &text);
  return {.kind = FailureKind::system,
          .phase = Phase::memory,
          .detail = fmt::format("{}: {}", what, text == nullptr ? fmt::format("CUresult {}", static_cast<int>(error)) : text)};
}

}  // namespace tokenyard
