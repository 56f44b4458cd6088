#pragma once
// What CUDA's two interfaces report, as failures, and as TransportError where there is nothing to return.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

#include "core/expected.h"

namespace tokenyard {

// `what` is the call and its values: "cudaMalloc of 4096 bytes on GPU 1". Also clears the runtime's last error, which a later
// check of a kernel launch would find otherwise.
Failure cuda_failure(cudaError_t error, const std::string& what);
Failure cuda_failure(CUresult error, const std::string& what);

inline Expected<void> cuda_result(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return {};
  return unexpected(cuda_failure(error, what));
}
inline Expected<void> cuda_result(CUresult error, const std::string& what) {
  if (error == CUDA_SUCCESS) return {};
  return unexpected(cuda_failure(error, what));
}

inline void cuda_check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw TransportError(cuda_failure(error, what));
}

}  // namespace tokenyard
