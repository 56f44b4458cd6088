#pragma once
// NCCL's interface, as far as this project uses it, and where it comes from: the library is looked for when it is first asked
// for, so that nothing of it is needed to build or to start. Types and numbers are those of its nccl.h since 2.14.

#include <climits>
#include <cstddef>
#include <optional>
#include <string>
#include <tl/expected.hpp>

#include "tokenyard/dtype.h"
#include "tokenyard/topo.h"

struct CUstream_st;

namespace tokenyard::nccl {

using Comm = void*;
using Window = void*;  // in device memory
enum class Result : int { success = 0, in_progress = 7 };
constexpr int kBytes = 0;  // ncclInt8
constexpr int kSum = 0;
// Of float32, bfloat16 and float16.
constexpr int type_of(Dtype dtype) {
  constexpr int kHalf = 6, kFloat = 7, kBfloat16 = 9;
  if (dtype == Dtype::float32) return kFloat;
  return dtype == Dtype::float16 ? kHalf : kBfloat16;
}
constexpr int kOldest = 21400;
constexpr int kOldestWithWindows = 22800;
constexpr int kSymmetricWindow = 1;  // NCCL_WIN_COLL_SYMMETRIC

struct UniqueId {
  char bytes[128];
};

// The head of ncclConfig_t: what lies behind it has defaults, as the version says.
struct Config {
  std::size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = kOldest;
  int blocking = 1;
  int cga_cluster_size = INT_MIN;
};

struct Team {
  int ranks, rank, stride;
};

struct Library {
  int version = 0;
  Result (*get_version)(int*) = nullptr;
  Result (*get_unique_id)(UniqueId*) = nullptr;
  Result (*comm_init_rank_config)(Comm*, int ranks, UniqueId, int rank, Config*) = nullptr;
  Result (*comm_abort)(Comm) = nullptr;
  Result (*comm_count)(Comm, int*) = nullptr;
  Result (*comm_user_rank)(Comm, int*) = nullptr;
  Result (*comm_get_async_error)(Comm, Result*) = nullptr;
  const char* (*get_error_string)(Result) = nullptr;
  const char* (*get_last_error)(Comm) = nullptr;
  Result (*group_start)() = nullptr;
  Result (*group_end)() = nullptr;
  Result (*send)(const void*, std::size_t, int type, int peer, Comm, CUstream_st*) = nullptr;
  Result (*recv)(void*, std::size_t, int type, int peer, Comm, CUstream_st*) = nullptr;
  Result (*all_gather)(const void*, void*, std::size_t, int type, Comm, CUstream_st*) = nullptr;
  Result (*reduce_scatter)(const void*, void*, std::size_t, int type, int operation, Comm, CUstream_st*) = nullptr;
  // Of windows, where no_windows() has no objection.
  Result (*mem_alloc)(void**, std::size_t) = nullptr;
  Result (*mem_free)(void*) = nullptr;
  Result (*comm_window_register)(Comm, void*, std::size_t, Window*, int flags) = nullptr;
  Result (*comm_window_deregister)(Comm, Window) = nullptr;
  Team (*team_lsa)(Comm) = nullptr;
  Result (*peer_pointer)(Window, std::size_t offset, int peer, void**) = nullptr;  // since 2.29, else null
};

struct Missing {
  std::string reason;
  std::string remedy;
};

// Loaded once: TOKENYARD_NCCL, a file or a name, else libnccl.so.2.
tl::expected<const Library*, Missing> library();
// "2.28.9". The encoding changed with 2.9, long before the oldest one that serves.
inline std::string version_text(int version) {
  const int major = version < 10'000 ? 1000 : 10'000;
  return std::to_string(version / major) + "." + std::to_string(version / 100 % (major / 100)) + "." + std::to_string(version % 100);
}

// Why this NCCL has no windows for kernels.
std::optional<Missing> no_windows();

// For topo: the collectives, and memory in windows; whether this build, this machine and its GPUs have them.
Backend backend();
Backend window_backend();

}  // namespace tokenyard::nccl
