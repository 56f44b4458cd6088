#pragma once
// Device memory that several ranks map: where it comes from, and how it gets into another process.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "core/deadline.h"
#include "core/expected.h"
#include "world/fd.h"

namespace tokenyard {

// Mapped in this process until the last copy goes; the memory itself lives as long as any process maps it (with IPC handles:
// as long as its owner does).
using CudaArena = std::shared_ptr<std::byte>;

// "GPU 1 (NVIDIA H200, 0000:1b:00.0)", and nothing but the number where CUDA says no more.
std::string describe_gpu(int device);

// Rounded up to what virtual memory of the device is made of, at least 2 MiB.
Expected<std::size_t> cuda_arena_bytes(int device, std::size_t bytes);

// Why virtual memory of the device cannot be exported as a descriptor (for rank threads: cannot be made); empty when it can.
std::string virtual_objection(int device, bool exported);

// CUDA virtual memory, readable and writable by `readers` (devices as numbered in this process).
struct VirtualArena {
  CudaArena arena;
  world_internal::Fd descriptor;  // when exported
};
Expected<VirtualArena> allocate_virtual(int device, std::size_t bytes, std::span<const int> readers, bool exported);
// A peer's, which made it with `bytes`.
Expected<CudaArena> import_virtual(int descriptor, std::size_t bytes, int reader);

// cudaMalloc: what is left where there is no virtual memory, or it cannot be exported.
Expected<CudaArena> allocate_plain(int device, std::size_t bytes);
// Lets `reader` address all plain memory of `device` in this process.
Expected<void> enable_peer_access(int reader, int device);
Expected<std::string> export_ipc(int device, const CudaArena& arena);
Expected<CudaArena> import_ipc(const std::string& handle, int reader);

// Zero-fills, and waits for it without waiting for other kernels of the device.
Expected<void> clear_arena(int device, const CudaArena& arena, std::size_t bytes, Deadline deadline);

}  // namespace tokenyard
