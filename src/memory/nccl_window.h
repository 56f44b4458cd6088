#pragma once
// Memory of GPUs in registered windows of NCCL (2.28 or newer): for ranks that have a communicator already, and for link domains that
// are larger than a host.

#include <cstddef>
#include <memory>

#include "memory/symmetric_memory.h"

namespace tokenyard {

struct NcclWindowOptions {
  int device = 0;                // the current one
  void* communicator = nullptr;  // as ExchangeOptions::nccl_communicator
  int timeout_ms = 0;
};

// Collective, on ranks that each have a GPU of their own. Views are device pointers, valid on this rank's GPU. Zero-filled.
// UsageError: two ranks share a GPU, or this NCCL has no windows; without TY_NCCL every call fails. Failures name the rank that cannot,
// and what NCCL says. A communicator of its own is aborted with the memory, which waits for nobody.
Expected<std::unique_ptr<SymmetricMemory>> create_nccl_window(const World& world, std::size_t bytes, const NcclWindowOptions& options);

}  // namespace tokenyard
