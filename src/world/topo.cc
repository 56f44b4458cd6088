#include "tokenyard/topo.h"

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "build_config.h"
#include "core/name_table.h"
#include "world/fd.h"
#include "world/gpus.h"
#include "world/nccl.h"
#include "world/state.h"

namespace tokenyard {
namespace {

constexpr NamedValue<Availability> kAvailabilities[] = {
    {Availability::available, "available"},
    {Availability::not_built, "not_built"},
    {Availability::not_usable, "not_usable"},
};

// Tried, not guessed: containers and sandboxes forbid single system calls.
Backend shm() {
  Backend backend{.name = "shm", .kind = "memory"};
  constexpr std::size_t kBytes = 4096;
  const world_internal::Fd file(memfd_create("tokenyard-probe", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  const char* failed = nullptr;
  if (!file)
    failed = "memfd_create";
  else if (ftruncate(file.get(), kBytes) != 0)
    failed = "ftruncate of a memory file";
  if (failed == nullptr) {
    void* mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    if (mapped == MAP_FAILED)
      failed = "mmap of a memory file";
    else
      munmap(mapped, kBytes);
  }
  if (failed == nullptr && !world_internal::Fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0))) failed = "a Unix socket";
  if (failed != nullptr) {
    backend.availability = Availability::not_usable;
    backend.reason = std::string(failed) + ": " + std::strerror(errno);
    backend.remedy = "allow it in the container or sandbox, or run ranks as threads (transport inproc)";
  }
  return backend;
}

Backend mpi() {
  Backend backend{.name = "mpi", .kind = "collective"};
  if (!kBuiltMpi) {
    backend.availability = Availability::not_built;
    backend.reason = "configured without TY_MPI";
    backend.remedy = "install an MPI (Debian: libopenmpi-dev) and configure with -DTY_MPI=ON";
  }
  return backend;
}

Backend cutlass() {
  Backend backend{.name = "cutlass", .kind = "products"};
  if (!kBuiltCutlass) {
    backend.availability = Availability::not_built;
    backend.reason = "configured without TY_CUTLASS";
    backend.remedy =
        "run './dev deps --cutlass' and configure with -DTY_CUDA=ON -DTY_CUTLASS=ON; without it, products on Hopper GPUs are slower";
  }
  return backend;
}

Backend later(std::string name, std::string kind, std::string instead) {
  return {.name = std::move(name),
          .kind = std::move(kind),
          .availability = Availability::not_built,
          .reason = "not in this release, which runs within one host",
          .remedy = std::move(instead)};
}

}  // namespace

std::string_view name(Availability availability) { return name_in(kAvailabilities, availability); }

std::vector<Backend> backends() {
  return {
      {.name = "inproc", .kind = "memory"},
      shm(),
      cuda_peer_backend(),
      nccl::window_backend(),
      later("libfabric", "port", "place all ranks on one host"),
      later("nccl_gin", "port", "place all ranks on one host"),
      {.name = "direct", .kind = "collective"},
      mpi(),
      nccl::backend(),
      cutlass(),
  };
}

int usual_sm_budget(Mode mode, int ranks, std::int64_t max_tokens_per_rank) {
  constexpr int kForLinks = 32;
  constexpr std::int64_t kMost = 1024;  // more than any GPU has
  if (mode == Mode::latency) return static_cast<int>(std::min(max_tokens_per_rank + 1, kMost));
  return ranks == 1 ? kForLinks : kForLinks * ranks / (ranks - 1);
}

Topology topology(const World& world) {
  Topology topology;
  topology.ranks = world.size();
  const world_internal::State& state = *world.state();
  for (int rank = 0; rank < world.size(); ++rank) {
    topology.hosts.push_back(world.host(rank));
    std::vector<LinkKind>& links = topology.links.emplace_back();
    for (int peer = 0; peer < world.size(); ++peer) {
      links.push_back(rank == peer ? LinkKind::self : link_between(state.identity(rank), state.identity(peer)));
    }
  }
  return topology;
}

}  // namespace tokenyard
