// Collectives on GPUs over NCCL: sends and receives in one group, and where there is something to add, a kernel of ours.

#include "world/nccl.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "collective/call.h"
#include "collective/device_collectives.h"
#include "core/deadline.h"
#include "core/usage.h"
#include "kernels/cuda/collective.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "tokenyard/collective.h"

namespace tokenyard::collective_internal {
namespace {

using nccl::Library;
using nccl::Result;

// What every rank tells the others before NCCL is asked for anything.
struct Card {
  std::array<char, 32> bus_id = {};
  nccl::UniqueId id = {};  // rank 0's is the communicator's
  std::array<char, 400> objection = {};
};

template <std::size_t kSize>
void put(std::array<char, kSize>& to, const std::string& text) {
  std::memcpy(to.data(), text.data(), std::min(text.size(), kSize - 1));
}

int device_of(const DeviceCollectiveOptions& options) {
  int device = options.device_index;
  if (device < 0) cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

std::string objection(const World& world, const DeviceCollectiveOptions& options, int device, Card& card) {
  if (options.timeout_ms <= 0) return fmt::format("DeviceCollectiveOptions.timeout_ms is {}; it must be > 0", options.timeout_ms);
  const auto library = nccl::library();
  if (!library) return fmt::format("no NCCL: {}; {}", library.error().reason, library.error().remedy);
  if (cudaDeviceGetPCIBusId(card.bus_id.data(), static_cast<int>(card.bus_id.size()), device) != cudaSuccess) {
    cudaGetLastError();
    return fmt::format("device_index is {}, which is no GPU here", device);
  }
  if (world.rank() != 0) return {};
  const Result result = (*library)->get_unique_id(&card.id);
  return result == Result::success ? "" : fmt::format("ncclGetUniqueId: {}", (*library)->get_error_string(result));
}

// All ranks learn whether all can, so that none waits for one that cannot. The id of the communicator.
nccl::UniqueId agree(const World& world, const DeviceCollectiveOptions& options, int device) {
  Card mine;
  const std::string why_not = objection(world, options, device, mine);
  put(mine.objection, why_not);
  const auto gathered = world.all_gather(std::as_bytes(std::span(&mine, 1)));
  if (!why_not.empty()) throw UsageError(why_not);
  std::vector<Card> cards(gathered.size());
  for (int rank = 0; rank < world.size(); ++rank) {
    std::memcpy(&cards[rank], gathered[rank].data(), sizeof(Card));
    if (cards[rank].objection[0] == '\0') continue;
    throw TransportError({.kind = FailureKind::aborted,
                          .phase = Phase::collective,
                          .rank = world.rank(),
                          .peer = rank,
                          .detail = cards[rank].objection.data()});
  }
  for (int rank = 0; rank < world.size(); ++rank) {
    for (int other = 0; other < rank; ++other) {
      if (cards[other].bus_id != cards[rank].bus_id || world.host(other) != world.host(rank)) continue;
      usage_error("ranks {} and {} both use GPU {}; NCCL takes one rank per GPU: use as many GPUs as ranks", other, rank,
                  cards[rank].bus_id.data());
    }
  }
  return cards[0].id;
}

[[noreturn]] void refuse_device_counts() {
  usage_error("counts on the device over NCCL, which takes them from the host; use transport cuda_peer, or give the host's counts");
}

class NcclCollectives final : public DeviceCollectives {
 public:
  NcclCollectives(const World& world, const DeviceCollectiveOptions& options, int device, nccl::UniqueId id)
      : world_(world),
        rank_(world.rank()),
        ranks_(world.size()),
        device_(device),
        timeout_ms_(options.timeout_ms),
        library_(**nccl::library()) {
    const CudaDeviceScope scope(device_);
    nccl::Config config{.blocking = options.launch_here ? 1 : 0};
    begin_call();
    settle("ncclCommInitRankConfig", library_.comm_init_rank_config(&comm_, ranks_, id, rank_, &config));
    connect();
  }
  // Local: aborting waits for nobody. What the caller wants done, it has waited for.
  ~NcclCollectives() override {
    if (comm_ != nullptr) library_.comm_abort(comm_);
  }
  NcclCollectives(const NcclCollectives&) = delete;
  NcclCollectives& operator=(const NcclCollectives&) = delete;

  void all_gather_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out, void* stream) override {
    begin_call();
    Call call(rank_, ranks_);
    call.set_all_gather(in, counts, out);
    check_dense(call);
    const auto bytes = static_cast<std::size_t>(counts[rank_] * call.row_bytes());
    const CudaDeviceScope scope(device_);
    if (std::all_of(counts.begin(), counts.end(), [&](std::int64_t count) { return count == counts[0]; })) {
      if (bytes > 0) settle("ncclAllGather", library_.all_gather(in.data, out.data, bytes, nccl::kBytes, comm_, as_stream(stream)));
      return;
    }
    exchange(std::span(&call, 1), as_stream(stream));
  }
  void all_to_all_v(std::span<const AllToAllRows> tables, void* stream) override {
    begin_call();
    std::vector<Call> calls;
    for (const AllToAllRows& table : tables) {
      Call& call = calls.emplace_back(rank_, ranks_);
      call.set_all_to_all(table.in, table.send_counts, table.out, table.receive_counts);
      check_dense(call);
    }
    exchange(calls, as_stream(stream));
  }
  void reduce_scatter_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out, void* stream) override;

  void all_gather_v(const ConstTensorView&, const DeviceCounts&, const TensorView&, void*) override { refuse_device_counts(); }
  void reduce_scatter_v(const ConstTensorView&, const DeviceCounts&, const TensorView&, void*) override { refuse_device_counts(); }
  void abandon(const std::string& /*reason*/, void* /*stream*/) override {}
  void wait_until(const std::function<bool()>& done) override;
  void wait(void* stream) override {
    const CudaDeviceScope scope(device_);
    wait_until([&] {
      const cudaError_t state = cudaStreamQuery(as_stream(stream));
      if (state != cudaSuccess && state != cudaErrorNotReady) cuda_check(state, "the work of a stream");
      return state == cudaSuccess;
    });
  }
  void check() override {
    if (gave_up_) throw TransportError(*gave_up_);
  }
  const World& world() const override { return world_; }
  Transport transport() const override { return Transport::nccl; }
  std::string library_version() const override { return nccl::version_text(library_.version); }

 private:
  static cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

  void begin_call() {
    if (gave_up_) throw TransportError(*gave_up_);
    ++call_number_;
  }
  static void check_dense(const Call& call) {
    for (const ConstTensorView& view : {call.in(), ConstTensorView(call.out())}) {
      if (view.shape[0] <= 1 || view.strides[0] * size_of(view.dtype) == call.row_bytes()) continue;
      usage_error("{} of {}: rows lie {} elements apart; NCCL takes dense rows: copy them", name(call.operation()), describe(view),
                  view.strides[0]);
    }
  }
  void connect();
  void exchange(std::span<const Call> calls, cudaStream_t stream);
  void send(const std::byte* rows, std::int64_t bytes, int to, cudaStream_t stream) {
    if (bytes > 0) note(library_.send(rows, static_cast<std::size_t>(bytes), nccl::kBytes, to, comm_, stream));
  }
  void receive(std::byte* rows, std::int64_t bytes, int from, cudaStream_t stream) {
    if (bytes > 0) note(library_.recv(rows, static_cast<std::size_t>(bytes), nccl::kBytes, from, comm_, stream));
  }
  void copy_own(const Call& call, cudaStream_t stream) const;
  template <class Enqueue>
  void group(Enqueue&& enqueue);
  void note(Result result) {
    if (result != Result::success && result != Result::in_progress && first_ == Result::success) first_ = result;
  }
  void settle(const char* what, Result result);
  std::optional<Failure> look_around(const Deadline& deadline) const;
  [[noreturn]] void fail(Failure failure);
  Failure failure(FailureKind kind, int peer, std::string detail) const {
    return {.kind = kind, .phase = Phase::collective, .rank = rank_, .peer = peer, .epoch = call_number_, .detail = std::move(detail)};
  }
  int peer_after(int steps) const { return (rank_ + steps) % ranks_; }
  int peer_before(int steps) const { return (rank_ + ranks_ - steps) % ranks_; }

  World world_;
  int rank_;
  int ranks_;
  int device_;
  int timeout_ms_;
  const Library& library_;
  nccl::Comm comm_ = nullptr;
  std::uint64_t call_number_ = 0;
  Result first_ = Result::success;  // the first error of a group
  DeviceBuffer partials_;           // of reduce_scatter_v
  std::optional<Failure> gave_up_;  // repeated by every later call
};

// NCCL connects two ranks when they first talk, and allocates memory for it: not while something else waits in a kernel.
void NcclCollectives::connect() {
  const DeviceBuffer words = value_or_throw(make_device_buffer(device_, static_cast<std::size_t>(2 * ranks_)));
  const CudaStream stream = value_or_throw(make_cuda_stream());
  group([&] {
    for (int i = 1; i < ranks_; ++i) {
      send(words.data() + rank_, 1, peer_after(i), stream.get());
      receive(words.data() + ranks_ + peer_before(i), 1, peer_before(i), stream.get());
    }
  });
  settle("ncclAllGather", library_.all_gather(words.data() + rank_, words.data(), 1, nccl::kBytes, comm_, stream.get()));
  wait(stream.get());
}

template <class Enqueue>
void NcclCollectives::group(Enqueue&& enqueue) {
  const CudaDeviceScope scope(device_);
  first_ = Result::success;
  note(library_.group_start());
  enqueue();
  const Result ended = library_.group_end();  // also behind an error: groups nest
  settle("a group of ncclSend and ncclRecv", first_ == Result::success ? ended : first_);
}

// Both sides know all counts, so nothing is sent where there is nothing.
void NcclCollectives::exchange(std::span<const Call> calls, cudaStream_t stream) {
  group([&] {
    for (int i = 1; i < ranks_; ++i) {
      const int to = peer_after(i), from = peer_before(i);
      for (const Call& call : calls) {
        const RowSpan& out = call.send(to);
        const RowSpan& in = call.receive(from);
        send(call.in().row(out.first), out.count * call.row_bytes(), to, stream);
        receive(call.out().row(in.first), in.count * call.row_bytes(), from, stream);
      }
    }
  });
  for (const Call& call : calls) copy_own(call, stream);
}

void NcclCollectives::copy_own(const Call& call, cudaStream_t stream) const {
  const auto bytes = static_cast<std::size_t>(call.send(rank_).count * call.row_bytes());
  if (call.in_place() || bytes == 0) return;
  const CudaDeviceScope scope(device_);
  cuda_check(cudaMemcpyAsync(call.out().row(call.receive(rank_).first), call.in().row(call.send(rank_).first), bytes,
                             cudaMemcpyDeviceToDevice, stream),
             "copying a rank's own rows");
}

void NcclCollectives::reduce_scatter_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out,
                                       void* stream) {
  begin_call();
  Call call(rank_, ranks_);
  call.set_reduce_scatter(in, counts, out);
  check_dense(call);
  const std::int64_t bytes = counts[rank_] * call.row_bytes();
  if (partials_.bytes() < static_cast<std::size_t>(bytes * ranks_)) {
    wait(stream);  // the old memory may still be read
    partials_ = {};
    partials_ = value_or_throw(make_device_buffer(device_, static_cast<std::size_t>(bytes * ranks_)));
  }
  group([&] {
    for (int i = 1; i < ranks_; ++i) {
      const int to = peer_after(i), from = peer_before(i);
      send(in.row(call.send(to).first), call.send(to).count * call.row_bytes(), to, as_stream(stream));
      receive(partials_.data() + from * bytes, bytes, from, as_stream(stream));
    }
  });
  if (bytes == 0) return;
  const CudaDeviceScope scope(device_);
  cuda::launch_ordered_sum({.own = in.row(call.send(rank_).first),
                            .others = partials_.data(),
                            .rank = rank_,
                            .ranks = ranks_,
                            .elements = counts[rank_] * call.row_elements(),
                            .dtype = call.dtype(),
                            .out = out.row(0)},
                           as_stream(stream));
  cuda_check(cudaGetLastError(), "enqueueing a sum");
}

// Behind it what was called is enqueued: NCCL's own thread may still be at it.
void NcclCollectives::settle(const char* what, Result result) {
  if (result == Result::in_progress) {
    wait_until([&] { return library_.comm_get_async_error(comm_, &result) == Result::success && result != Result::in_progress; });
  }
  if (result == Result::success) return;
  const char* const text = comm_ != nullptr ? library_.get_last_error(comm_) : nullptr;
  fail(failure(FailureKind::system, -1,
               fmt::format("{}: {}{}{}; NCCL_DEBUG=WARN tells more", what, library_.get_error_string(result), text != nullptr ? ": " : "",
                           text != nullptr ? text : "")));
}

void NcclCollectives::wait_until(const std::function<bool()>& done) {
  if (gave_up_) throw TransportError(*gave_up_);
  constexpr unsigned kSpins = 64;  // between looks at the clock
  constexpr auto kTick = std::chrono::milliseconds(1);
  if (done()) return;
  const Deadline deadline = Deadline::after_ms(timeout_ms_);
  auto next_look = Deadline::Clock::now() + kTick;
  for (unsigned spins = 1; !done(); ++spins) {
    if (spins % kSpins != 0 || Deadline::Clock::now() < next_look) continue;
    if (auto trouble = look_around(deadline)) fail(std::move(*trouble));
    sched_yield();
    next_look = Deadline::Clock::now() + kTick;
  }
}

std::optional<Failure> NcclCollectives::look_around(const Deadline& deadline) const {
  for (int i = 1; i < ranks_; ++i) {
    if (!world_.alive(peer_after(i))) return failure(FailureKind::peer_lost, peer_after(i), "its process ended, or its thread gave up");
  }
  Result state = Result::success;
  if (comm_ != nullptr) library_.comm_get_async_error(comm_, &state);
  if (state != Result::success && state != Result::in_progress) {
    return failure(FailureKind::system, -1, fmt::format("NCCL: {}: {}", library_.get_error_string(state), library_.get_last_error(comm_)));
  }
  if (!deadline.expired()) return std::nullopt;
  return failure(FailureKind::timeout, -1,
                 fmt::format("NCCL is not done within {} ms, and does not say for which rank it waits; a rank did not make this call, is "
                             "stopped, or needs a longer timeout_ms",
                             timeout_ms_));
}

void NcclCollectives::fail(Failure failure) {
  gave_up_ = std::move(failure);
  if (comm_ != nullptr) library_.comm_abort(std::exchange(comm_, nullptr));
  throw TransportError(*gave_up_);
}

}  // namespace

std::unique_ptr<DeviceCollectives> make_nccl(const World& world, const DeviceCollectiveOptions& options) {
  const int device = device_of(options);
  const nccl::UniqueId id = agree(world, options, device);
  return std::make_unique<NcclCollectives>(world, options, device, id);
}

}  // namespace tokenyard::collective_internal
