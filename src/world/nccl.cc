#include "world/nccl.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include "core/env.h"
#include "world/gpus.h"

namespace tokenyard::nccl {
namespace {

constexpr const char* kRemedy =
    "install NCCL 2.14 or newer (NVIDIA's packages libnccl2, or nvidia-nccl-cu12 and -cu13 of pip), and name its libnccl.so.2 in "
    "TOKENYARD_NCCL or its folder in LD_LIBRARY_PATH";

class Loader {
 public:
  explicit Loader(void* file) : file_(file) {}
  template <class Function>
  void operator()(const char* symbol, Function& function) {
    function = reinterpret_cast<Function>(dlsym(file_, symbol));
    if (function == nullptr && missing_ == nullptr) missing_ = symbol;
  }
  template <class Function>
  void if_any(const char* symbol, Function& function) const {
    function = reinterpret_cast<Function>(dlsym(file_, symbol));
  }
  const char* missing() const { return missing_; }

 private:
  void* file_;
  const char* missing_ = nullptr;
};

tl::expected<Library, Missing> load() {
  const std::string name = env("TOKENYARD_NCCL").value_or("libnccl.so.2");
  void* const file = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);  // for good: NCCL has threads
  if (file == nullptr) return tl::unexpected(Missing{fmt::format("dlopen: {}", dlerror()), kRemedy});
  Library calls;
  Loader look_up(file);
  look_up("ncclGetVersion", calls.get_version);
  look_up("ncclGetUniqueId", calls.get_unique_id);
  look_up("ncclCommInitRankConfig", calls.comm_init_rank_config);
  look_up("ncclCommAbort", calls.comm_abort);
  look_up("ncclCommCount", calls.comm_count);
  look_up("ncclCommUserRank", calls.comm_user_rank);
  look_up("ncclCommGetAsyncError", calls.comm_get_async_error);
  look_up("ncclGetErrorString", calls.get_error_string);
  look_up("ncclGetLastError", calls.get_last_error);
  look_up("ncclGroupStart", calls.group_start);
  look_up("ncclGroupEnd", calls.group_end);
  look_up("ncclSend", calls.send);
  look_up("ncclRecv", calls.recv);
  look_up("ncclAllGather", calls.all_gather);
  look_up("ncclReduceScatter", calls.reduce_scatter);
  look_up.if_any("ncclMemAlloc", calls.mem_alloc);
  look_up.if_any("ncclMemFree", calls.mem_free);
  look_up.if_any("ncclCommWindowRegister", calls.comm_window_register);
  look_up.if_any("ncclCommWindowDeregister", calls.comm_window_deregister);
  look_up.if_any("ncclTeamLsa", calls.team_lsa);
  look_up.if_any("ncclGetPeerDevicePointer", calls.peer_pointer);
  if (calls.get_version != nullptr) calls.get_version(&calls.version);
  if (look_up.missing() != nullptr || calls.version < kOldest) {
    const std::string what = look_up.missing() != nullptr ? fmt::format(" without {}", look_up.missing()) : "";
    return tl::unexpected(
        Missing{fmt::format("{} is NCCL {}{}; 2.14 or newer is needed", name, calls.version == 0 ? "?" : version_text(calls.version), what),
                kRemedy});
  }
  return calls;
}

}  // namespace

tl::expected<const Library*, Missing> library() {
  static const tl::expected<Library, Missing> loaded = load();
  if (!loaded) return tl::unexpected(loaded.error());
  return &*loaded;
}

std::optional<Missing> no_windows() {
  const auto found = library();
  if (!found) return found.error();
  const Library& calls = **found;
  const bool complete = calls.mem_alloc != nullptr && calls.mem_free != nullptr && calls.comm_window_register != nullptr &&
                        calls.comm_window_deregister != nullptr && calls.team_lsa != nullptr;
  if (calls.version < kOldestWithWindows || !complete)
    return Missing{fmt::format("NCCL {} has no windows that kernels address", version_text(calls.version)),
                   "install NCCL 2.28 or newer and name its libnccl.so.2 in TOKENYARD_NCCL, or use cuda_peer, which needs no NCCL"};
  for (const char* const needed : {"NCCL_CUMEM_ENABLE", "NCCL_WIN_ENABLE"}) {
    if (env(needed) == "0") return Missing{fmt::format("{0}=0 tells NCCL to do without windows", needed), fmt::format("unset {}", needed)};
  }
  return std::nullopt;
}

namespace {

Backend described(Backend result, const std::optional<Missing>& missing) {
  if (const auto found = library()) result.version = version_text((*found)->version);
  if (const Backend gpus = cuda_peer_backend(); gpus.availability != Availability::available) {
    result.availability = gpus.availability;
    result.reason = gpus.reason;
    result.remedy = gpus.remedy;
  } else if (missing) {
    result.availability = Availability::not_usable;
    result.reason = missing->reason;
    result.remedy = missing->remedy;
  }
  return result;
}

// NCCL has windows only where all GPUs of a communicator address each other.
std::optional<Missing> no_peer_access() {
  const GpuTopology topology = gpu_topology();
  for (std::size_t gpu = 0; gpu < topology.gpus.size(); ++gpu) {
    for (std::size_t peer = 0; peer < topology.gpus.size(); ++peer) {
      if (topology.peer_access[gpu][peer]) continue;
      return Missing{fmt::format("GPU {} cannot address the memory of GPU {}", gpu, peer),
                     "let CUDA_VISIBLE_DEVICES choose GPUs with peer access, or exchange through host memory"};
    }
  }
  return std::nullopt;
}

}  // namespace

Backend backend() {
  const auto found = library();
  return described({.name = "nccl", .kind = "collective"}, found ? std::nullopt : std::optional(found.error()));
}

Backend window_backend() {
  std::optional<Missing> missing = no_windows();
  if (!missing) missing = no_peer_access();
  return described({.name = "nccl_window", .kind = "memory"}, missing);
}

}  // namespace tokenyard::nccl
