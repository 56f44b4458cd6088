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
  look_up("ncclCommGetAsyncError", calls.comm_get_async_error);
  look_up("ncclGetErrorString", calls.get_error_string);
  look_up("ncclGetLastError", calls.get_last_error);
  look_up("ncclGroupStart", calls.group_start);
  look_up("ncclGroupEnd", calls.group_end);
  look_up("ncclSend", calls.send);
  look_up("ncclRecv", calls.recv);
  look_up("ncclAllGather", calls.all_gather);
  look_up("ncclReduceScatter", calls.reduce_scatter);
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

Backend backend() {
  Backend result{.name = "nccl", .kind = "collective"};
  const auto found = library();
  if (found) result.version = version_text((*found)->version);
  if (const Backend gpus = cuda_peer_backend(); gpus.availability != Availability::available) {
    result.availability = gpus.availability;
    result.reason = gpus.reason;
    result.remedy = gpus.remedy;
  } else if (!found) {
    result.availability = Availability::not_usable;
    result.reason = found.error().reason;
    result.remedy = found.error().remedy;
  }
  return result;
}

}  // namespace tokenyard::nccl
