#include "memory/cuda_peer.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string>

#include "core/log.h"
#include "core/usage.h"
#include "memory/cuda_arena.h"
#include "memory/cuda_error.h"
#include "memory/offer.h"
#include "world/bytes.h"

namespace tokenyard {
namespace {

using world_internal::ByteReader;
using world_internal::ByteWriter;
using world_internal::Fd;

// Which GPU a rank has, told to all. Numbers of devices differ between processes, bus addresses do not.
struct GpuOffer {
  std::string bus_id;
  std::int32_t device = 0;  // as numbered in the rank's process
  std::string objection;    // why its memory cannot be virtual memory

  std::string encode() const {
    ByteWriter out;
    out.put_text(bus_id);
    out.put(device);
    out.put_text(objection);
    const auto bytes = out.take();
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  static GpuOffer decode(const std::string& text) {
    ByteReader in(std::as_bytes(std::span(text)));
    GpuOffer offer;
    offer.bus_id = in.get_text();
    offer.device = in.get<std::int32_t>();
    offer.objection = in.get_text();
    return offer;
  }
};

// One rank's part in making the memory of all.
class Creation {
 public:
  Creation(const World& world, int device, Deadline deadline) : world_(world), device_(device), deadline_(deadline) {}

  // Learns who has which GPU, and refuses pairs of GPUs that cannot address each other.
  Expected<void> meet(std::size_t bytes, CudaSharing sharing);
  // This rank's memory, cleared, and the peers'.
  Expected<std::vector<CudaArena>> make();
  std::size_t bytes() const { return mine_.bytes; }

 private:
  bool exported() const { return !world_.is_in_process() && world_.size() > 1; }
  bool same_gpu(int peer) const { return gpus_[peer].bus_id == gpus_[world_.rank()].bus_id; }
  GpuOffer look_at_own_gpu(std::size_t bytes, CudaSharing sharing);
  std::string access_objection() const;
  std::vector<int> readers() const;
  Expected<bool> make_virtual();
  Expected<void> make_plain();
  Expected<std::vector<Offer>> agree() { return agree_on_offers(world_, mine_, deadline_); }
  Expected<std::vector<CudaArena>> import_all();
  Expected<CudaArena> import_from(int peer, std::vector<Fd>& descriptors) const;

  const World& world_;
  int device_;
  Deadline deadline_;
  Offer mine_{.transport = Transport::cuda_peer};
  std::vector<GpuOffer> gpus_;
  std::vector<Offer> offers_;  // of the last agreement
  VirtualArena own_;           // its descriptor is empty with IPC handles
  Expected<FdExchange> descriptors_ = FdExchange();
  bool virtual_ = false;
};

GpuOffer Creation::look_at_own_gpu(std::size_t bytes, CudaSharing sharing) {
  GpuOffer gpu{.bus_id = {}, .device = device_, .objection = {}};
  int count = 0;
  auto seen = cuda_result(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  if (seen && device_ < 0) seen = cuda_result(cudaGetDevice(&device_), "cudaGetDevice");
  if (!seen) {
    mine_.error = seen.error().detail + "; `tokenyard topo` says what is missing";
    return gpu;
  }
  if (device_ >= count) {
    mine_.error = fmt::format("GPU {}: this process sees {} of them, numbered from 0 (CUDA_VISIBLE_DEVICES hides others)", device_, count);
    return gpu;
  }
  gpu.device = device_;
  std::array<char, 32> bus = {};
  seen = cuda_result(cudaDeviceGetPCIBusId(bus.data(), static_cast<int>(bus.size()), device_), "cudaDeviceGetPCIBusId");
  const auto rounded = cuda_arena_bytes(device_, bytes);
  if (!seen || !rounded) {
    mine_.error = seen ? rounded.error().detail : seen.error().detail;
    return gpu;
  }
  mine_.bytes = *rounded;
  gpu.bus_id = bus.data();
  gpu.objection = sharing == CudaSharing::ipc_handles ? "IPC handles were asked for" : virtual_objection(device_, exported());
  return gpu;
}

// A peer on a GPU that this process does not see cannot be asked about: mapping its memory will tell.
std::string Creation::access_objection() const {
  for (int peer = 0; peer < world_.size(); ++peer) {
    int device = -1;
    if (same_gpu(peer) || cudaDeviceGetByPCIBusId(&device, gpus_[peer].bus_id.c_str()) != cudaSuccess) {
      cudaGetLastError();
      continue;
    }
    int can = 0;
    const cudaError_t error = cudaDeviceCanAccessPeer(&can, device_, device);
    if (error == cudaSuccess && can != 0) continue;
    return fmt::format(
        "{} cannot address the memory of rank {}'s {} (cudaDeviceCanAccessPeer: {}); choose GPUs with peer access (`tokenyard topo` shows "
        "which have it), or make ranks exchange through host memory",
        describe_gpu(device_), peer, describe_gpu(device), error == cudaSuccess ? "no" : cudaGetErrorString(error));
  }
  return {};
}

Expected<void> Creation::meet(std::size_t bytes, CudaSharing sharing) {
  mine_.bytes = bytes;
  mine_.extra = look_at_own_gpu(bytes, sharing).encode();
  auto offers = agree();
  if (!offers) return unexpected(std::move(offers.error()));
  for (const Offer& offer : *offers) gpus_.push_back(GpuOffer::decode(offer.extra));
  const auto objects = std::find_if(gpus_.begin(), gpus_.end(), [](const GpuOffer& gpu) { return !gpu.objection.empty(); });
  virtual_ = objects == gpus_.end();
  if (!virtual_) {
    log_info("rank {}: cuda_peer with plain memory, since rank {}: {}", world_.rank(), objects - gpus_.begin(), objects->objection);
  }
  mine_.error = access_objection();
  return {};
}

// Which devices of this process use this rank's mapping.
std::vector<int> Creation::readers() const {
  if (!world_.is_in_process()) return {device_};
  std::vector<int> devices;
  for (const GpuOffer& gpu : gpus_) {
    if (std::find(devices.begin(), devices.end(), gpu.device) == devices.end()) devices.push_back(gpu.device);
  }
  return devices;
}

// False when some rank could not, and all of them go on without.
Expected<bool> Creation::make_virtual() {
  mine_.extra.clear();
  if (mine_.error.empty()) {
    auto made = allocate_virtual(device_, mine_.bytes, readers(), exported());
    if (!made) {
      mine_.extra = made.error().detail;
    } else if (auto cleared = clear_arena(device_, made->arena, mine_.bytes, deadline_); !cleared) {
      mine_.error = cleared.error().detail;
    } else {
      own_ = std::move(*made);
      mine_.object = own_.arena;
    }
  }
  if (mine_.error.empty() && exported()) {
    descriptors_ = FdExchange::listen();
    if (descriptors_)
      mine_.endpoint = descriptors_->endpoint();
    else
      mine_.error = descriptors_.error().detail;
  }
  auto offers = agree();
  if (!offers) return unexpected(std::move(offers.error()));
  offers_ = std::move(*offers);
  const auto refused = std::find_if(offers_.begin(), offers_.end(), [](const Offer& offer) { return !offer.extra.empty(); });
  if (refused == offers_.end()) return true;
  log_warn("rank {}: cuda_peer falls back to plain memory, since rank {}: {}", world_.rank(), refused - offers_.begin(), refused->extra);
  offers_.clear();
  mine_.object.reset();
  own_ = {};
  return false;
}

Expected<void> Creation::make_plain() {
  mine_.extra.clear();
  if (mine_.error.empty()) {
    auto made = allocate_plain(device_, mine_.bytes);
    Expected<void> cleared;
    if (made) cleared = clear_arena(device_, *made, mine_.bytes, deadline_);
    Expected<std::string> handle = std::string();
    if (made && cleared && exported()) handle = export_ipc(device_, *made);
    if (!made || !cleared || !handle) {
      mine_.error = !made ? made.error().detail : !cleared ? cleared.error().detail : handle.error().detail;
    } else {
      own_.arena = std::move(*made);
      mine_.object = own_.arena;
      mine_.extra = std::move(*handle);
    }
  }
  auto offers = agree();
  if (!offers) return unexpected(std::move(offers.error()));
  offers_ = std::move(*offers);
  return {};
}

Expected<CudaArena> Creation::import_from(int peer, std::vector<Fd>& descriptors) const {
  if (peer == world_.rank()) return own_.arena;
  if (world_.is_in_process()) {
    if (!virtual_ && !same_gpu(peer)) {
      if (auto enabled = enable_peer_access(device_, gpus_[peer].device); !enabled) return unexpected(std::move(enabled.error()));
    }
    return std::static_pointer_cast<std::byte>(offers_[peer].object);
  }
  return virtual_ ? import_virtual(descriptors[peer].get(), offers_[peer].bytes, device_) : import_ipc(offers_[peer].extra, device_);
}

Expected<std::vector<CudaArena>> Creation::import_all() {
  std::vector<Fd> descriptors;
  if (virtual_ && exported()) {
    std::vector<FdExchange::Endpoint> endpoints;
    for (const Offer& offer : offers_) endpoints.push_back(offer.endpoint);
    auto swapped = descriptors_->swap(world_, endpoints, own_.descriptor.get(), deadline_);
    if (!swapped) return unexpected(std::move(swapped.error()));
    descriptors = std::move(*swapped);
  }
  std::vector<CudaArena> arenas;
  for (int peer = 0; peer < world_.size(); ++peer) {
    auto arena = import_from(peer, descriptors);
    if (!arena) {
      Failure failure = std::move(arena.error());
      failure.peer = peer;
      failure.detail = fmt::format("{} of rank {} cannot map the memory of rank {}'s GPU {}: {}", describe_gpu(device_), world_.rank(),
                                   peer, gpus_[peer].bus_id, failure.detail);
      return unexpected(std::move(failure));
    }
    arenas.push_back(std::move(*arena));
  }
  return arenas;
}

Expected<std::vector<CudaArena>> Creation::make() {
  if (virtual_) {
    const auto made = make_virtual();
    if (!made) return unexpected(made.error());
    virtual_ = *made;
  }
  if (!virtual_) {
    if (auto made = make_plain(); !made) return unexpected(std::move(made.error()));
  }
  auto arenas = import_all();
  own_.descriptor.reset();
  // A rank that failed must not leave the others believing that its memory is there.
  if (!arenas) mine_.error = arenas.error().message();
  mine_.object.reset();
  const auto confirmed = agree();
  if (!arenas) {
    arenas.error().rank = world_.rank();
    return arenas;
  }
  if (!confirmed) return unexpected(confirmed.error());
  return arenas;
}

}  // namespace

Expected<std::unique_ptr<SymmetricMemory>> CudaPeerMemory::create(const World& world, std::size_t bytes, int device, Deadline deadline,
                                                                  CudaSharing sharing) {
  if (const int peer = first_peer_without_memory(world); peer >= 0) {
    usage_error(
        "transport cuda_peer: rank {} (host {}) and rank {} (host {}) share no memory: other machine, network namespace or user; place all "
        "ranks on one host, or use a transport for networks",
        world.rank(), world.host(world.rank()), peer, world.host(peer));
  }
  Creation creation(world, device, deadline);
  if (auto met = creation.meet(bytes, sharing); !met) return unexpected(std::move(met.error()));
  auto arenas = creation.make();
  if (!arenas) return unexpected(std::move(arenas.error()));
  return std::unique_ptr<SymmetricMemory>(new CudaPeerMemory(std::move(*arenas), creation.bytes()));
}

}  // namespace tokenyard
