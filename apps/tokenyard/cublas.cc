#include "cublas.h"

#include <dlfcn.h>
#include <fmt/core.h>

#include "core/env.h"

namespace tokenyard::cli {
namespace {

// Of cuBLAS's header, which a build machine need not have.
constexpr int kNormal = 0, kTransposed = 1, kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14, kCompute32 = 68, kDefaultAlgorithm = -1;

// cuBLAS's matrices are column-major, and so ours transposed: it is asked for c^T = b^T a^T.
struct AsColumns {
  std::vector<int> of_b, of_a, m, n, k, ld_b, ld_a, ld_c, sizes;
  std::vector<float> alpha, beta;
};

AsColumns as_columns(const std::vector<MatrixProduct>& products) {
  AsColumns all;
  for (const MatrixProduct& p : products) {
    all.of_b.push_back(p.b_transposed ? kTransposed : kNormal);
    all.of_a.push_back(p.a_transposed ? kTransposed : kNormal);
    all.m.push_back(p.n);
    all.n.push_back(p.m);
    all.k.push_back(p.k);
    all.ld_b.push_back(p.b_transposed ? p.k : p.n);
    all.ld_a.push_back(p.a_transposed ? p.m : p.k);
    all.ld_c.push_back(p.n);
    all.sizes.push_back(1);
    all.alpha.push_back(1.0F);
    all.beta.push_back(p.accumulate ? 1.0F : 0.0F);
  }
  return all;
}

}  // namespace

struct Cublas::Calls {
  int (*create)(void**);
  int (*destroy)(void*);
  int (*set_stream)(void*, cudaStream_t);
  int (*gemm)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*, void*, int, int, int,
              int);
  int (*grouped)(void*, const int*, const int*, const int*, const int*, const int*, const void*, const void* const*, int, const int*,
                 const void* const*, int, const int*, const void*, void* const*, int, const int*, int, const int*, int);
};

Cublas::Cublas(Dtype dtype) : dtype_(dtype) {
  void* file = nullptr;
  for (const char* const name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
    if (file == nullptr) file = dlopen(env("TOKENYARD_CUBLAS").value_or(name).c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (file == nullptr) {
    missing_ = "no cuBLAS here: install it and name its libcublas.so in TOKENYARD_CUBLAS or its folder in LD_LIBRARY_PATH";
    return;
  }
  static Calls calls;
  calls.create = reinterpret_cast<decltype(calls.create)>(dlsym(file, "cublasCreate_v2"));
  calls.destroy = reinterpret_cast<decltype(calls.destroy)>(dlsym(file, "cublasDestroy_v2"));
  calls.set_stream = reinterpret_cast<decltype(calls.set_stream)>(dlsym(file, "cublasSetStream_v2"));
  calls.gemm = reinterpret_cast<decltype(calls.gemm)>(dlsym(file, "cublasGemmEx"));
  calls.grouped = reinterpret_cast<decltype(calls.grouped)>(dlsym(file, "cublasGemmGroupedBatchedEx"));
  if (calls.gemm == nullptr || calls.set_stream == nullptr || calls.create == nullptr || calls.create(&handle_) != 0) {
    missing_ = "cuBLAS could not be started: is it of this CUDA, and does the GPU have memory left?";
    return;
  }
  calls_ = &calls;
}

Cublas::~Cublas() {
  if (handle_ != nullptr && calls_ != nullptr) calls_->destroy(handle_);
}

bool Cublas::loop(const std::vector<MatrixProduct>& products, cudaStream_t stream) {
  if (calls_ == nullptr || calls_->set_stream(handle_, stream) != 0) return false;
  const AsColumns all = as_columns(products);
  const int type = dtype_ == Dtype::bfloat16 ? kBfloat16 : kFloat16;
  for (std::size_t i = 0; i < products.size(); ++i) {
    const MatrixProduct& p = products[i];
    const int c_type = p.accumulate ? kFloat32 : type;
    if (calls_->gemm(handle_, all.of_b[i], all.of_a[i], all.m[i], all.n[i], all.k[i], &all.alpha[i], p.b, type, all.ld_b[i], p.a, type,
                     all.ld_a[i], &all.beta[i], p.c, c_type, all.ld_c[i], kCompute32, kDefaultAlgorithm) != 0) {
      return false;
    }
  }
  return true;
}

void Cublas::prepare_grouped(const std::vector<MatrixProduct>& products, void* pointers, cudaStream_t stream) {
  std::vector<const void*> all;
  for (const MatrixProduct& p : products) all.push_back(p.b);
  for (const MatrixProduct& p : products) all.push_back(p.a);
  for (const MatrixProduct& p : products) all.push_back(p.c);
  cudaMemcpyAsync(pointers, all.data(), all.size() * sizeof(void*), cudaMemcpyHostToDevice, stream);
  cudaStreamSynchronize(stream);
}

bool Cublas::grouped(const std::vector<MatrixProduct>& products, void* pointers, cudaStream_t stream) {
  if (calls_ == nullptr || calls_->grouped == nullptr || products.empty() || calls_->set_stream(handle_, stream) != 0) return false;
  const AsColumns all = as_columns(products);
  const int type = dtype_ == Dtype::bfloat16 ? kBfloat16 : kFloat16;
  auto* const b = static_cast<void**>(pointers);
  void** const a = b + products.size();
  void** const c = a + products.size();
  return calls_->grouped(handle_, all.of_b.data(), all.of_a.data(), all.m.data(), all.n.data(), all.k.data(), all.alpha.data(), b, type,
                         all.ld_b.data(), a, type, all.ld_a.data(), all.beta.data(), c, products[0].accumulate ? kFloat32 : type,
                         all.ld_c.data(), static_cast<int>(products.size()), all.sizes.data(), kCompute32) == 0;
}

}  // namespace tokenyard::cli
