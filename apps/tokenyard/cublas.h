#pragma once
// cuBLAS, looked for when it is first used: the benchmark's baseline, which nothing else needs.

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "tokenyard/dtype.h"

namespace tokenyard::cli {

// c[m,n] = a[m,k] b[k,n], or += with `accumulate`; all row-major in device memory. transposed: memory holds the transposed matrix.
struct MatrixProduct {
  int m = 0, n = 0, k = 0;
  const void* a = nullptr;
  const void* b = nullptr;
  void* c = nullptr;
  bool a_transposed = false, b_transposed = false;
  bool accumulate = false;
};

class Cublas {
 public:
  // of a and b; c is of the same type, or float32 where it accumulates.
  explicit Cublas(Dtype dtype);
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;
  // Why there is none here, or empty.
  const std::string& missing() const { return missing_; }
  // One after the other. False when cuBLAS refuses.
  bool loop(const std::vector<MatrixProduct>& products, cudaStream_t stream);
  // In one call. `pointers` has room for 3 pointers a product in device memory, and holds them after prepare_grouped.
  void prepare_grouped(const std::vector<MatrixProduct>& products, void* pointers, cudaStream_t stream);
  bool grouped(const std::vector<MatrixProduct>& products, void* pointers, cudaStream_t stream);

 private:
  struct Calls;
  Dtype dtype_;
  Calls* calls_ = nullptr;
  void* handle_ = nullptr;
  std::string missing_;
};

}  // namespace tokenyard::cli
