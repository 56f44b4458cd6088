#pragma once
// What this machine and this build can do, with the reason and the remedy where something is missing.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenyard/options.h"
#include "tokenyard/world.h"

namespace tokenyard {

enum class Availability : std::uint8_t { available, not_built, not_usable };
std::string_view name(Availability availability);

struct Backend {
  std::string name;  // "inproc", "shm", "cuda_peer", "mpi", "nccl", "cutlass", ...
  std::string kind;  // "memory", "collective", "port", "products"
  Availability availability = Availability::available;
  std::string reason{};  // empty when available
  std::string remedy{};
  std::string version{};  // of a library that is looked for at run time
};
std::vector<Backend> backends();

// A GPU that CUDA shows to this process, numbered as CUDA does.
struct Gpu {
  std::string name;
  std::string bus_id;          // of PCI: the same in every process
  int compute_capability = 0;  // 90 is 9.0
  int num_sms = 0;
  std::int64_t memory_bytes = 0;
};
struct GpuTopology {
  std::vector<Gpu> gpus;                       // [G]; empty where there are none, or the build has no CUDA
  std::vector<std::vector<bool>> peer_access;  // [G][G]: whether the first addresses the memory of the second
};
GpuTopology gpu_topology();

// Multiprocessors that kernels of an exchange on GPUs take while they wait for peers, unless ExchangeOptions::sm_budget says otherwise; at
// most what the GPU has and other exchanges of the process leave. throughput: where the links are nearly full (docs/kernels.md); rows
// that stay on their GPU are moved by the same ones, and with few ranks they are many. latency: one for each token, and one more.
int usual_sm_budget(Mode mode, int ranks, std::int64_t max_tokens_per_rank);

struct Topology {
  int ranks = 0;
  std::vector<std::string> hosts;            // [R]
  std::vector<std::vector<LinkKind>> links;  // [R][R]
};
Topology topology(const World& world);

}  // namespace tokenyard
