// What belongs to no single call: loading kernels, rejecting a call, waiting for what peers still do.

#include <cuda_runtime_api.h>

#include "core/preload.h"
#include "kernels/cuda/block.cuh"
#include "kernels/cuda/kernels.h"

namespace tokenyard::cuda {
namespace {

constexpr int kControlThreads = 256;

__global__ void reject_call(const __grid_constant__ Context c, const char* reason) {
  const std::uint64_t call = call_number(c);
  for (int i = threadIdx.x; i < c.ranks * protocol::kReasonBytes; i += kControlThreads) {
    const int at = i % protocol::kReasonBytes;
    mailbox(c, i / protocol::kReasonBytes, c.rank).reason[at] = reason[at];
  }
  __syncthreads();
  for (int peer = threadIdx.x; peer < c.ranks; peer += kControlThreads) {
    ptx::store_release(&mailbox(c, peer, c.rank).aborted, call);  // release: publishes the reason
    set_flag(c, Flag::left, peer, call);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  c.state->unsettled = call;
  c.state->call = call;
}

__global__ void wait_reads(const __grid_constant__ Context c) { settle(c, state_of_call(c)); }

__global__ void wait_weights(const __grid_constant__ Context c) {
  if (!block_has_failed(c)) wait_for_all(c, Flag::weights, Phase::combine_weights, call_number(c), true);
}

__global__ void wait_partials(const __grid_constant__ Context c) {
  if (!block_has_failed(c)) wait_for_all(c, Flag::partials, Phase::combine_rows, call_number(c), true);
}

const Preloaded preloaded({{reject_call}, {wait_reads}, {wait_weights}, {wait_partials}});

}  // namespace

void preload_kernels() {
  int device = 0, shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  for (const Preloaded* file = Preloaded::first(); file != nullptr; file = file->next()) {
    for (const PreloadedKernel& kernel : file->kernels()) {
      cudaFuncAttributes attributes;
      const bool loaded = cudaFuncGetAttributes(&attributes, kernel.function) == cudaSuccess;
      if (!loaded || !kernel.all_shared_memory) continue;
      cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           shared - static_cast<int>(attributes.sharedSizeBytes));
    }
  }
  cudaGetLastError();  // kernels of another architecture are not there to load
}

void launch_reject(const Context& context, const char* reason, Stream stream) {
  reject_call<<<1, kControlThreads, 0, stream>>>(context, reason);
}

void launch_wait_reads(const Context& context, Stream stream) { wait_reads<<<1, kControlThreads, 0, stream>>>(context); }

void launch_wait_weights(const Context& context, Stream stream) { wait_weights<<<1, kControlThreads, 0, stream>>>(context); }

void launch_wait_partials(const Context& context, Stream stream) { wait_partials<<<1, kControlThreads, 0, stream>>>(context); }

}  // namespace tokenyard::cuda
