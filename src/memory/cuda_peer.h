#pragma once
// Memory of GPUs that address each other: over NVLink or PCIe on one host, or of one GPU that several ranks share.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "memory/symmetric_memory.h"

namespace tokenyard {

// How memory gets into the other processes. automatic: as file descriptors where all GPUs can, else as IPC handles, and logs which.
enum class CudaSharing : std::uint8_t { automatic, ipc_handles };

// Views are device pointers, valid on this rank's GPU (rank threads: on the GPUs of all ranks). A multiple of 2 MiB, zero-filled.
// With file descriptors a view outlives its owner's process; with IPC handles it must not be used after its owner's end.
class CudaPeerMemory final : public SymmetricMemory {
 public:
  // Collective, on one host. device: as numbered in this process; -1: the current one. Ranks may share GPUs, as threads or as
  // processes. Failures name the rank that did not arrive, or the pair of GPUs without peer access; without TY_CUDA every call fails.
  static Expected<std::unique_ptr<SymmetricMemory>> create(const World& world, std::size_t bytes, int device, Deadline deadline,
                                                           CudaSharing sharing = CudaSharing::automatic);

  std::byte* view(int rank) const override { return arenas_.at(rank).get(); }
  std::size_t bytes() const override { return bytes_; }
  Transport transport() const override { return Transport::cuda_peer; }

 private:
  CudaPeerMemory(std::vector<std::shared_ptr<std::byte>> arenas, std::size_t bytes) : arenas_(std::move(arenas)), bytes_(bytes) {}

  std::vector<std::shared_ptr<std::byte>> arenas_;  // of every rank, as this process maps it
  std::size_t bytes_;
};

}  // namespace tokenyard
