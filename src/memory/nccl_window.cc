#include "memory/nccl_window.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "core/log.h"
#include "memory/cuda_arena.h"
#include "memory/cuda_error.h"
#include "memory/cuda_handle.h"
#include "memory/nccl_communicator.h"
#include "memory/offer.h"

namespace tokenyard {
namespace {

using nccl::Communicator;
using nccl::Result;

constexpr std::size_t kGranularity = std::size_t{2} << 20;
// Behind the memory that is handed out: something that only its owner knows, so that peers see whether they look at the right memory.
using Proof = std::uint64_t;
constexpr std::size_t kProofBytes = 4096;

// The head of what a window's handle points at in device memory: ncclWindow_vidmem in NCCL's nccl_device/impl/core__types.h, the same
// from 2.28 to 2.30. Versions with ncclGetPeerDevicePointer (2.29) tell what they mean by it themselves.
struct WindowHead {
  void* host;
  std::byte* first;      // the memory of the team's first rank
  int team_rank;         // of this rank
  int rank;              // of this rank
  std::uint32_t stride;  // from rank to rank, in units of 4 GiB
};

Failure memory_failure(std::string detail) { return {.kind = FailureKind::system, .phase = Phase::memory, .detail = std::move(detail)}; }

class NcclWindow final : public SymmetricMemory {
 public:
  NcclWindow(const World& world, const NcclWindowOptions& options, std::size_t bytes)
      : world_(world),
        options_(options),
        library_(**nccl::library()),
        bytes_((bytes + kProofBytes + kGranularity - 1) / kGranularity * kGranularity) {}
  ~NcclWindow() override;

  std::byte* view(int rank) const override { return views_.at(rank); }
  std::size_t bytes() const override { return bytes_ - kProofBytes; }
  Transport transport() const override { return Transport::nccl_window; }

  // Each a step that every rank takes, or tells the others why it cannot.
  Expected<void> prepare();
  Expected<void> open(const nccl::UniqueId& id);
  Expected<void> verify(const Expected<void>& opened);

 private:
  bool all_alive() const;
  Expected<void> allocate();
  std::string given_objection() const;
  Expected<void> find_views();
  Expected<WindowHead> head() const;
  Expected<std::byte*> view_of(int rank, const std::optional<WindowHead>& head) const;
  Expected<void> copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) const;
  Expected<std::vector<Offer>> agree(const Expected<void>& mine, std::string extra = {}) const;
  Failure no_window() const;
  std::string version() const { return nccl::version_text(library_.version); }

  World world_;
  NcclWindowOptions options_;
  const nccl::Library& library_;
  std::size_t bytes_;  // of a rank's memory, with the proof
  CudaArena memory_;
  std::unique_ptr<nccl::Window> window_ = std::make_unique<nccl::Window>(nullptr);  // NCCL's thread writes it
  std::optional<Communicator> communicator_;
  std::vector<std::byte*> views_;
};

NcclWindow::~NcclWindow() {
  const CudaDeviceScope scope(options_.device);
  // With a rank lost, aborting the communicator takes the window along: nothing more is asked of it.
  if (communicator_ && communicator_->get() != nullptr && window_ && *window_ != nullptr && (communicator_->is_given() || all_alive()))
    library_.comm_window_deregister(communicator_->get(), *window_);
  communicator_.reset();  // maps the memory until then
}

bool NcclWindow::all_alive() const {
  for (int rank = 0; rank < world_.size(); ++rank) {
    if (!world_.alive(rank)) return false;
  }
  return true;
}

Expected<std::vector<Offer>> NcclWindow::agree(const Expected<void>& mine, std::string extra) const {
  Offer offer{.bytes = bytes_, .transport = Transport::nccl_window, .extra = std::move(extra)};
  if (!mine) offer.error = mine.error().detail;
  return agree_on_offers(world_, offer, Deadline::after_ms(options_.timeout_ms));
}

// Of a stated kind: an address that is none of a device is an error then, and not taken for one of the host.
Expected<void> NcclWindow::copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) const {
  const auto stream = borrow_cuda_stream();
  if (!stream) return unexpected(stream.error());
  auto copied = cuda_result(cudaMemcpyAsync(to, from, bytes, kind, stream->get()), "cudaMemcpy of a window of NCCL");
  if (!copied) return copied;
  return cuda_result(cudaStreamSynchronize(stream->get()), "reading a window of NCCL");
}

Expected<void> NcclWindow::allocate() {
  void* data = nullptr;
  if (const Result result = library_.mem_alloc(&data, bytes_); result != Result::success) {
    return unexpected(memory_failure(
        fmt::format("ncclMemAlloc of {} bytes on {}: {}", bytes_, describe_gpu(options_.device), library_.get_error_string(result))));
  }
  memory_ = CudaArena(static_cast<std::byte*>(data), [free = library_.mem_free](std::byte* memory) { free(memory); });
  return clear_arena(options_.device, memory_, bytes_, Deadline::after_ms(options_.timeout_ms));
}

std::string NcclWindow::given_objection() const {
  int ranks = -1, rank = -1;
  const Result counted = library_.comm_count(options_.communicator, &ranks);
  if (counted != Result::success || library_.comm_user_rank(options_.communicator, &rank) != Result::success)
    return fmt::format(
        "nccl_communicator is no communicator of NCCL {}; give an ncclComm_t of the library that TOKENYARD_NCCL names, or "
        "null",
        version());
  if (ranks == world_.size() && rank == world_.rank()) return {};
  return fmt::format("nccl_communicator has rank {} of {} here, the exchange rank {} of {}; give one over the same ranks, or null", rank,
                     ranks, world_.rank(), world_.size());
}

Expected<void> NcclWindow::prepare() {
  const bool given = options_.communicator != nullptr;
  Expected<void> mine;
  if (const std::string objection = given ? given_objection() : ""; !objection.empty()) mine = unexpected(memory_failure(objection));
  if (mine) mine = allocate();
  const auto offers = agree(mine, given ? "given" : "");
  if (!offers) return unexpected(offers.error());
  for (int peer = 0; peer < world_.size(); ++peer) {
    if (((*offers)[peer].extra == "given") == given) continue;
    return unexpected({.kind = FailureKind::mismatch,
                       .phase = Phase::memory,
                       .rank = world_.rank(),
                       .peer = peer,
                       .detail = fmt::format("nccl_communicator is given to rank {} and not to rank {}; give one to every rank or to none",
                                             given ? world_.rank() : peer, given ? peer : world_.rank())});
  }
  return {};
}

Expected<void> NcclWindow::open(const nccl::UniqueId& id) {
  if (world_.size() == 1) {  // NCCL gives a rank alone no window, and nobody else looks at its memory
    views_ = {memory_.get()};
    return {};
  }
  const Communicator::Options how{.device = options_.device, .phase = Phase::memory, .timeout_ms = options_.timeout_ms};
  try {
    if (options_.communicator != nullptr)
      communicator_.emplace(world_, options_.communicator, how);
    else
      communicator_.emplace(world_, id, how);
  } catch (const TransportError& error) {
    return unexpected(error.failure());
  }
  auto opened = communicator_->settle("ncclCommWindowRegister", library_.comm_window_register(communicator_->get(), memory_.get(), bytes_,
                                                                                              window_.get(), nccl::kSymmetricWindow));
  // NCCL 2.28 says that a communicator is done while its thread still registers.
  if (opened) opened = communicator_->wait_until([this] { return std::atomic_ref(*window_).load(std::memory_order_acquire) != nullptr; });
  if (!opened) {
    // NCCL's thread may still be at it, and only the owner of a communicator ends it.
    if (communicator_->is_given()) static_cast<void>(window_.release());
    return opened;
  }
  return find_views();
}

Failure NcclWindow::no_window() const {
  return memory_failure(
      fmt::format("NCCL {} gave no window: it finds that not all GPUs address each other, or has no virtual memory; `tokenyard topo` shows "
                  "which GPUs do; unset NCCL_CUMEM_ENABLE, NCCL_WIN_ENABLE and NCCL_P2P_DISABLE, also in NCCL's configuration file, or use "
                  "transport cuda_peer (NCCL_DEBUG=INFO tells more)",
                  version()));
}

bool is_device_memory(const void* at) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, at) == cudaSuccess) return attributes.type == cudaMemoryTypeDevice;
  cudaGetLastError();
  return false;
}

Expected<WindowHead> NcclWindow::head() const {
  WindowHead head{};
  if (auto read = copy(&head, *window_, sizeof head, cudaMemcpyDeviceToHost); !read) return unexpected(read.error());
  if (head.rank == world_.rank() && head.team_rank == world_.rank() && head.stride > 0) return head;
  return unexpected(memory_failure(
      fmt::format("windows of NCCL {} are not as expected: rank {} in a team of rank {} with {} x 4 GiB between ranks; use NCCL 2.29 or "
                  "newer, which tells addresses itself, or transport cuda_peer",
                  version(), head.rank, head.team_rank, head.stride)));
}

Expected<std::byte*> NcclWindow::view_of(int rank, const std::optional<WindowHead>& head) const {
  void* at = nullptr;
  if (head) {
    at = head->first + (static_cast<std::uint64_t>(rank) * head->stride << 32U);
  } else if (const Result result = library_.peer_pointer(*window_, 0, rank, &at); result != Result::success) {
    return unexpected(memory_failure(fmt::format("ncclGetPeerDevicePointer: {}", library_.get_error_string(result))));
  }
  if (at != nullptr && (rank != world_.rank() || is_device_memory(at))) return static_cast<std::byte*>(at);
  return unexpected(memory_failure(fmt::format("NCCL {} has no address here for the memory of rank {}", version(), rank)));
}

Expected<void> NcclWindow::find_views() {
  // Where it has none, an older NCCL hands out something else.
  if (!is_device_memory(*window_)) return unexpected(no_window());
  if (const nccl::Team team = library_.team_lsa(communicator_->get()); team.ranks != world_.size()) {
    return unexpected(
        memory_failure(fmt::format("only {} of {} ranks are in one load/store team of NCCL; place all ranks where GPUs address each other",
                                   team.ranks, world_.size())));
  }
  std::optional<WindowHead> known;
  if (library_.peer_pointer == nullptr) {
    auto read = head();
    if (!read) return unexpected(read.error());
    known = *read;
  }
  // This rank's own memory, too, is used at the address of its view alone: two addresses of one memory have no order in a kernel.
  for (int rank = 0; rank < world_.size(); ++rank) {
    auto view = view_of(rank, known);
    if (!view) return unexpected(view.error());
    views_.push_back(*view);
  }
  log_info("rank {}: windows of NCCL {} over {} communicator, addresses {}", world_.rank(), version(),
           communicator_->is_given() ? "a given" : "its own", known ? "from the window" : "of ncclGetPeerDevicePointer");
  return {};
}

Expected<void> NcclWindow::verify(const Expected<void>& opened) {
  std::random_device random;
  const Proof proof = static_cast<Proof>(random()) << 32U | random();
  const auto written = opened ? copy(views_[world_.rank()] + bytes(), &proof, sizeof proof, cudaMemcpyHostToDevice) : opened;
  const auto offers = agree(written, std::string(reinterpret_cast<const char*>(&proof), sizeof proof));
  if (!offers) return unexpected(written || offers.error().kind == FailureKind::peer_lost ? offers.error() : written.error());
  Expected<void> mine;
  for (int peer = 0; mine && peer < world_.size(); ++peer) {
    Proof seen = 0;
    mine = copy(&seen, views_[peer] + bytes(), sizeof seen, cudaMemcpyDeviceToHost);
    if (!mine || std::memcmp(&seen, (*offers)[peer].extra.data(), sizeof seen) == 0) continue;
    mine = unexpected(memory_failure(
        fmt::format("what NCCL {} says is the memory of rank {} is not: addresses {}; use another version, or transport cuda_peer",
                    version(), peer, library_.peer_pointer == nullptr ? "read from its window" : "of ncclGetPeerDevicePointer")));
  }
  const auto confirmed = agree(mine);
  if (!mine) return mine;
  if (!confirmed) return unexpected(confirmed.error());
  return {};
}

}  // namespace

Expected<std::unique_ptr<SymmetricMemory>> create_nccl_window(const World& world, std::size_t bytes, const NcclWindowOptions& options) {
  std::string objection;
  if (const auto missing = nccl::no_windows()) objection = fmt::format("transport nccl_window: {}; {}", missing->reason, missing->remedy);
  const nccl::UniqueId id = nccl::agree(world, options.device, std::move(objection), Phase::memory, options.communicator);
  auto memory = std::make_unique<NcclWindow>(world, options, bytes);
  Expected<void> done = memory->prepare();
  // A rank that failed must not leave the others believing that its memory is there.
  if (done) done = memory->verify(memory->open(id));
  if (done) return memory;
  done.error().rank = world.rank();
  return unexpected(std::move(done.error()));
}

}  // namespace tokenyard
