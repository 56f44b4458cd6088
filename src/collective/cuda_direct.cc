// Collectives over memory of GPUs that address each other: the host checks and enqueues one kernel a call.

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "collective/call.h"
#include "collective/device_collectives.h"
#include "collective/lane_arena.h"
#include "core/log.h"
#include "core/usage.h"
#include "kernels/cuda/kernels.h"
#include "memory/cuda_stream.h"
#include "memory/sm_budget.h"

namespace tokenyard::collective_internal {
namespace {

using cuda::DirectCollectiveArgs;
using cuda::DirectOperation;

constexpr std::int64_t kMinStagingBytes = 4096;
constexpr std::int64_t kMaxStagingBytes = std::int64_t{1} << 40;
constexpr int kUsualSms = 32;  // links are nearly full with fewer

// What every rank tells the others before memory is made.
struct Card {
  char gpu[sizeof(cudaUUID_t)] = {};
  std::int64_t staging_bytes = 0;
  char objection[400] = {};
};

std::string objection(const World& world, const DeviceCollectiveOptions& options, int device, Card& card) {
  if (world.size() > cuda::kMostCollectiveRanks)
    return fmt::format("collectives over {} serve {} ranks, the world has {}; use transport nccl", name(options.transport),
                       cuda::kMostCollectiveRanks, world.size());
  if (options.timeout_ms <= 0) return fmt::format("DeviceCollectiveOptions.timeout_ms is {}; it must be > 0", options.timeout_ms);
  if (options.staging_bytes < kMinStagingBytes || options.staging_bytes > kMaxStagingBytes)
    return fmt::format("DeviceCollectiveOptions.staging_bytes is {}; it must be in [{}, {}]", options.staging_bytes, kMinStagingBytes,
                       kMaxStagingBytes);
  if (options.sm_budget < 0) return fmt::format("DeviceCollectiveOptions.sm_budget is {}; give 1 or more, or 0", options.sm_budget);
  cudaDeviceProp properties{};
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    cudaGetLastError();
    return fmt::format("device_index is {}, which is no GPU here", device);
  }
  std::memcpy(card.gpu, properties.uuid.bytes, sizeof card.gpu);
  return {};
}

// All ranks learn whether all can and want the same. How many ranks share this rank's GPU.
int agree(const World& world, const DeviceCollectiveOptions& options, int device) {
  Card mine{.staging_bytes = options.staging_bytes};
  const std::string why_not = objection(world, options, device, mine);
  std::memcpy(mine.objection, why_not.data(), std::min(why_not.size(), sizeof(mine.objection) - 1));
  const auto cards = world.all_gather(std::as_bytes(std::span(&mine, 1)));
  if (!why_not.empty()) throw UsageError(why_not);
  int sharing = 0;
  for (int peer = 0; peer < world.size(); ++peer) {
    Card theirs;
    std::memcpy(&theirs, cards[peer].data(), sizeof theirs);
    Failure failure{
        .kind = FailureKind::aborted, .phase = Phase::collective, .rank = world.rank(), .peer = peer, .detail = theirs.objection};
    if (!failure.detail.empty()) throw TransportError(std::move(failure));
    sharing += std::equal(mine.gpu, mine.gpu + sizeof mine.gpu, theirs.gpu) ? 1 : 0;
    if (theirs.staging_bytes == mine.staging_bytes) continue;
    failure.kind = FailureKind::mismatch;
    failure.detail = fmt::format("options differ: rank {} has staging_bytes {}, rank {} has {}", world.rank(), mine.staging_bytes, peer,
                                 theirs.staging_bytes);
    throw TransportError(std::move(failure));
  }
  return sharing;
}

// As many lanes as the rank with the fewest multiprocessors has of them, and as slots that are not too short leave.
int agree_on_lanes(const World& world, std::int64_t staging_bytes, int multiprocessors) {
  std::int64_t lanes = std::max<std::int64_t>(1, staging_bytes / (protocol::kLaneSlots * protocol::kLeastSlotBytes));
  for (const auto& bytes : world.all_gather(std::as_bytes(std::span(&multiprocessors, 1)))) {
    int theirs = 0;
    std::memcpy(&theirs, bytes.data(), sizeof theirs);
    lanes = std::min<std::int64_t>(lanes, theirs);
  }
  return static_cast<int>(lanes);
}

std::string_view name_of(DirectOperation operation) {
  if (operation == DirectOperation::all_gather_v) return name(Operation::all_gather_v);
  return name(operation == DirectOperation::reduce_scatter_v ? Operation::reduce_scatter_v : Operation::all_to_all_v);
}

std::string describe(const protocol::CollectiveHeader& header) {
  return fmt::format("{} of rows of {} bytes of {}", name_of(static_cast<DirectOperation>(header.operation)), header.row_bytes,
                     tokenyard::name(static_cast<Dtype>(header.dtype)));
}

// As many rows of the tensor of all ranks as there can be.
template <class Pointer>
BasicTensorView<Pointer> bounded(BasicTensorView<Pointer> all, std::span<const std::int64_t> most) {
  const std::int64_t rows = std::accumulate(most.begin(), most.end(), std::int64_t{0});
  if (all.ndim == 0 || all.shape[0] < rows) {
    usage_error("the tensor of all ranks is {}; expected at least {} rows, as many as the ranks can have",
                all ? tokenyard::describe(all) : "absent", rows);
  }
  all.shape[0] = rows;
  return all;
}

class CudaDirect final : public DeviceCollectives {
 public:
  CudaDirect(const World& world, const DeviceCollectiveOptions& options, int device, int sharing);
  ~CudaDirect() override {
    const CudaDeviceScope scope(device_);
    // What is enqueued runs to its end: peers count on it. It ends in any case, at the latest at its deadlines.
    try {
      order_.wait();
    } catch (const std::exception& error) {
      log_info("collectives: while they were destroyed: {}", error.what());
    }
  }
  CudaDirect(const CudaDirect&) = delete;
  CudaDirect& operator=(const CudaDirect&) = delete;

  void all_gather_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out, void* stream) override {
    run(DirectOperation::all_gather_v, stream, [&](Call& call) { call.set_all_gather(in, counts, out); });
  }
  void reduce_scatter_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out, void* stream) override {
    run(DirectOperation::reduce_scatter_v, stream, [&](Call& call) { call.set_reduce_scatter(in, counts, out); });
  }
  void all_to_all_v(std::span<const AllToAllRows> tables, void* stream) override {
    for (const AllToAllRows& table : tables) {
      run(DirectOperation::all_to_all_v, stream, [&](Call& call) {
        call.set_all_to_all(table.in, table.send_counts, table.out, table.receive_counts);
        check_own_counts(call);
      });
    }
  }

  void all_gather_v(const ConstTensorView& in, const DeviceCounts& counts, const TensorView& out, void* stream) override {
    const auto check = [&](Call& call) {
      const auto most = bounds(counts, in);
      call.set_all_gather(in, most, bounded(out, most));
    };
    run(DirectOperation::all_gather_v, stream, check, &counts);
  }
  void reduce_scatter_v(const ConstTensorView& in, const DeviceCounts& counts, const TensorView& out, void* stream) override {
    const auto check = [&](Call& call) {
      const auto most = bounds(counts, out);
      call.set_reduce_scatter(bounded(in, most), most, out);
    };
    run(DirectOperation::reduce_scatter_v, stream, check, &counts);
  }

  void abandon(const std::string& reason, void* stream) override {
    const CudaDeviceScope scope(device_);
    check();
    reject(static_cast<cudaStream_t>(stream), reason);
  }
  void wait_until(const std::function<bool()>& done) override;
  void wait(void* stream) override {
    const CudaDeviceScope scope(device_);
    wait_until([&] {
      const cudaError_t state = cudaStreamQuery(static_cast<cudaStream_t>(stream));
      if (state != cudaSuccess && state != cudaErrorNotReady) cuda_check(state, "the work of a stream");
      return state == cudaSuccess;
    });
  }
  void check() override;

  const World& world() const override { return world_; }
  Transport transport() const override { return arena_->transport(); }
  std::string library_version() const override { return {}; }

 private:
  template <class Check>
  void run(DirectOperation operation, void* stream, Check&& check_arguments, const DeviceCounts* counts = nullptr);
  std::span<const std::int64_t> bounds(const DeviceCounts& counts, const ConstTensorView& mine);
  void set_counts(DirectCollectiveArgs& args, const DeviceCounts& counts) const;
  void check_own_counts(const Call& call) const;
  void check_memory(const char* what, const ConstTensorView& view) const;
  void reject(cudaStream_t stream, const std::string& reason);
  DirectCollectiveArgs args_of(DirectOperation operation, const Call& call) const;
  void set_words(DirectCollectiveArgs& args) const;
  void set_lanes(DirectCollectiveArgs& args) const;
  std::string describe_mismatch(const protocol::ErrorRecord& record) const;

  World world_;
  int rank_;
  int ranks_;
  int device_;
  int timeout_ms_;
  SmBudget budget_;
  std::unique_ptr<LaneArena> arena_;
  std::unique_ptr<LostWatch> watch_;
  Call call_;
  std::vector<std::int64_t> bounds_;
  CallOrder order_;
};

CudaDirect::CudaDirect(const World& world, const DeviceCollectiveOptions& options, int device, int sharing)
    : world_(world), rank_(world.rank()), ranks_(world.size()), device_(device), timeout_ms_(options.timeout_ms), call_(rank_, ranks_) {
  const CudaDeviceScope scope(device_);
  cuda_check(scope.status(), "cudaSetDevice");
  budget_ = take_sm_budget(device_, options.sm_budget, std::min(kUsualSms, std::max(1, multiprocessors_of(device_) / sharing)));
  cuda::preload_kernels();
  const int lanes = agree_on_lanes(world_, options.staging_bytes, budget_.multiprocessors);
  const std::int64_t slot_bytes =
      options.staging_bytes / (std::int64_t{lanes} * protocol::kLaneSlots) / protocol::kChunkAlignment * protocol::kChunkAlignment;
  arena_ = std::make_unique<LaneArena>(world_, LaneOptions{.transport = options.transport,
                                                           .nccl_communicator = options.nccl_communicator,
                                                           .device = device_,
                                                           .lanes = lanes,
                                                           .slot_bytes = slot_bytes,
                                                           .timeout_ms = timeout_ms_});
  watch_ = arena_->watch(world_);
  world_.barrier();  // nobody waits in a kernel while another rank still allocates
}

template <class Check>
void CudaDirect::run(DirectOperation operation, void* on, Check&& check_arguments, const DeviceCounts* counts) {
  const CudaDeviceScope scope(device_);
  const auto stream = static_cast<cudaStream_t>(on);
  check();
  DirectCollectiveArgs args;
  try {
    check_arguments(call_);
    check_memory("in", call_.in());
    check_memory("out", call_.out());
    args = args_of(operation, call_);
    if (counts != nullptr) set_counts(args, *counts);
  } catch (const UsageError& error) {
    reject(stream, error.what());
    throw;
  }
  order_.enter(stream);
  cuda::launch_direct_collective(args, stream);
  cuda_check(cudaGetLastError(), "enqueueing a collective");
  order_.leave(stream);
}

// What the host can say of counts that it does not know.
std::span<const std::int64_t> CudaDirect::bounds(const DeviceCounts& counts, const ConstTensorView& mine) {
  bounds_.assign(static_cast<std::size_t>(ranks_), counts.most);
  if (mine.ndim > 0) bounds_[rank_] = std::min(counts.most, mine.shape[0]);
  return bounds_;
}

void CudaDirect::set_counts(DirectCollectiveArgs& args, const DeviceCounts& counts) const {
  const ConstTensorView& table = counts.counts;
  if (table.ndim != 1 || table.shape[0] != ranks_ || table.dtype != Dtype::int32 || table.strides[0] != 1) {
    usage_error("{}: counts are {}; expected [{}] int32 in device memory, rows of each rank", name_of(args.operation),
                table ? tokenyard::describe(table) : "absent", ranks_);
  }
  if (call_.in_place()) usage_error("{}: in and out overlap; where the device has the counts, use two buffers", name_of(args.operation));
  check_memory("counts", table);
  args.counts = table.as<std::int32_t>();
  args.most_rows = counts.most;
}

// Of other pairs the ranks learn it from each other.
void CudaDirect::check_own_counts(const Call& call) const {
  const std::int64_t sent = call.send(rank_).count, received = call.receive(rank_).count;
  if (call.in_place() || sent == received) return;
  usage_error("all_to_all_v: rank {} sends {} rows to itself and expects {}; give the same, or 0 for rows that stay where they are", rank_,
              sent, received);
}

void CudaDirect::check_memory(const char* what, const ConstTensorView& view) const {
  if (view.data == nullptr || view.num_elements() == 0) return;
  cudaPointerAttributes attributes{};
  cuda_check(cudaPointerGetAttributes(&attributes, view.data), "cudaPointerGetAttributes");
  if (attributes.type == cudaMemoryTypeUnregistered)
    usage_error("{} is {} in ordinary host memory; these collectives are on GPU {}: copy it there first", what, tokenyard::describe(view),
                device_);
  if (attributes.type == cudaMemoryTypeDevice && attributes.device != device_)
    usage_error("{} is {} on GPU {}; these collectives are on GPU {}: copy it there first", what, tokenyard::describe(view),
                attributes.device, device_);
}

void CudaDirect::reject(cudaStream_t stream, const std::string& reason) {
  arena_->reject(order_, stream, reason, [&](const char* text, cudaStream_t on) { cuda::launch_reject(arena_->context(), text, on); });
}

DirectCollectiveArgs CudaDirect::args_of(DirectOperation operation, const Call& call) const {
  const std::int64_t element = size_of(call.dtype());
  DirectCollectiveArgs args;
  args.context = arena_->context();
  args.lanes = arena_->lanes();
  args.operation = operation;
  args.dtype = call.dtype();
  args.row_bytes = call.row_bytes();
  args.in = {static_cast<const std::byte*>(call.in().data), call.in().strides[0] * element};
  args.out = {static_cast<std::byte*>(call.out().data), call.out().strides[0] * element};
  args.keeps_own = operation != DirectOperation::reduce_scatter_v && !call.in_place();
  for (int peer = 0; peer < ranks_; ++peer) {
    args.send[peer] = {call.send(peer).first, call.send(peer).count};
    args.receive[peer] = {call.receive(peer).first, call.receive(peer).count};
  }
  set_words(args);
  set_lanes(args);
  return args;
}

// The longest word of which addresses, strides and rows are multiples, where there are rows.
void CudaDirect::set_words(DirectCollectiveArgs& args) const {
  std::uint64_t bits = static_cast<std::uint64_t>(args.row_bytes) | 16U;
  const auto note = [&](const std::byte* data, std::int64_t stride, std::int64_t rows) {
    if (rows > 0) bits |= std::bit_cast<std::uintptr_t>(data) | static_cast<std::uint64_t>(stride);
  };
  note(args.in.data, args.in.stride, call_.in().shape[0]);
  note(args.out.data, args.out.stride, call_.out().shape[0]);
  const int word = 1 << std::countr_zero(bits);
  args.word_bytes = word == 8 ? 4 : word;
  const std::int64_t element = size_of(args.dtype);
  if (args.operation == DirectOperation::reduce_scatter_v && word < element && args.row_bytes > 0)
    usage_error("reduce_scatter_v: in is {} and out is {}; elements of {} bytes must lie at multiples of {}",
                tokenyard::describe(call_.in()), tokenyard::describe(call_.out()), element, element);
}

void CudaDirect::set_lanes(DirectCollectiveArgs& args) const {
  std::int64_t most = 0;
  for (int peer = 0; peer < ranks_; ++peer) {
    most = std::max({most, args.send[peer].count, args.receive[peer].count});
  }
  const protocol::LaneCut cut = protocol::LaneCut::of(most * args.row_bytes, args.lanes.lanes, args.lanes.slot_bytes);
  if (cut.chunks_of(0) >= std::int64_t{1} << protocol::kFlagBits)
    usage_error("{} rows of {} bytes need {} rounds; raise staging_bytes", most, args.row_bytes, cut.chunks_of(0));
  args.lanes_used = static_cast<int>(std::clamp<std::int64_t>(cut.chunks(), 1, args.lanes.lanes));
}

void CudaDirect::wait_until(const std::function<bool()>& done) {
  constexpr int kGraceMs = 1000;  // kernels have deadlines of their own, whose errors tell more
  const Deadline deadline = Deadline::after_ms(timeout_ms_ + kGraceMs);
  while (!done()) {
    if (deadline.expired()) {
      check();
      throw TransportError({.kind = FailureKind::timeout,
                            .phase = Phase::collective,
                            .rank = rank_,
                            .detail = fmt::format("what was waited for is not done within {} ms, and no collective has failed: other work "
                                                  "is in its way, or it needs a longer timeout_ms",
                                                  timeout_ms_ + kGraceMs)});
    }
    sched_yield();
  }
  check();
}

void CudaDirect::check() {
  const auto record = arena_->take_failure();
  if (!record) return;
  const CudaDeviceScope scope(device_);
  Failure failure = arena_->describe(*record);
  if (failure.kind == FailureKind::mismatch) failure.detail = describe_mismatch(*record);
  throw TransportError(std::move(failure));
}

std::string CudaDirect::describe_mismatch(const protocol::ErrorRecord& record) const {
  if (record.peer == rank_) return fmt::format("a rank found that this one made another call; its own error tells more");
  const protocol::CollectiveHeader mine = arena_->header_of(record.peer, rank_, record.call);
  const protocol::CollectiveHeader theirs = arena_->header_of(rank_, record.peer, record.call);
  if (mine.fits(theirs)) return fmt::format("rank {} has stopped with this failure; its own error tells more", record.peer);
  return fmt::format("rank {} called {}, sends {} rows to rank {} and expects {}; rank {} called {}, sends {} and expects {}", rank_,
                     describe(mine), mine.sends, record.peer, mine.expects, record.peer, describe(theirs), theirs.sends, theirs.expects);
}

}  // namespace

std::unique_ptr<DeviceCollectives> make_cuda_direct(const World& world, const DeviceCollectiveOptions& options) {
  int device = options.device_index;
  if (device < 0 && cudaGetDevice(&device) != cudaSuccess) cudaGetLastError();  // -1 then, which is no GPU
  const int sharing = agree(world, options, device);
  return std::make_unique<CudaDirect>(world, options, device, sharing);
}

}  // namespace tokenyard::collective_internal
