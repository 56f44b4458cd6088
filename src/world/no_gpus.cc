// Built instead of gpus.cc without TY_CUDA.

#include "world/gpus.h"

namespace tokenyard {

GpuTopology gpu_topology() { return {}; }

Backend cuda_peer_backend() {
  return {.name = "cuda_peer",
          .kind = "memory",
          .availability = Availability::not_built,
          .reason = "configured without TY_CUDA",
          .remedy = "install the CUDA toolkit (12.4 or newer) and configure with -DTY_CUDA=ON; on CPUs use shm or inproc"};
}

}  // namespace tokenyard
