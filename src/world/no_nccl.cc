// Built instead of nccl.cc without TY_NCCL.

#include "world/nccl.h"

namespace tokenyard::nccl {

tl::expected<const Library*, Missing> library() {
  return tl::unexpected(Missing{"configured without TY_NCCL", "configure with -DTY_CUDA=ON -DTY_NCCL=ON"});
}

std::optional<Missing> no_windows() { return library().error(); }

Backend window_backend() {
  return {.name = "nccl_window",
          .kind = "memory",
          .availability = Availability::not_built,
          .reason = "configured without TY_NCCL",
          .remedy = "configure with -DTY_CUDA=ON -DTY_NCCL=ON, which needs nothing of NCCL; on one host cuda_peer does without"};
}

Backend backend() {
  return {.name = "nccl",
          .kind = "collective",
          .availability = Availability::not_built,
          .reason = "configured without TY_NCCL",
          .remedy = "configure with -DTY_CUDA=ON -DTY_NCCL=ON, which needs nothing of NCCL; on CPUs use direct or mpi"};
}

}  // namespace tokenyard::nccl
