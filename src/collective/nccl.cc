// Collectives on GPUs over NCCL: sends and receives in one group, and where there is something to add, a kernel of ours.

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "collective/call.h"
#include "collective/device_collectives.h"
#include "core/usage.h"
#include "kernels/cuda/collective.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "memory/nccl_communicator.h"
#include "tokenyard/collective.h"

namespace tokenyard::collective_internal {
namespace {

using nccl::Library;
using nccl::Result;

int device_of(const DeviceCollectiveOptions& options) {
  int device = options.device_index;
  if (device < 0) cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

std::string objection(const DeviceCollectiveOptions& options) {
  if (options.timeout_ms > 0) return {};
  return fmt::format("DeviceCollectiveOptions.timeout_ms is {}; it must be > 0", options.timeout_ms);
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
        comm_(world, id, {.device = device, .blocking = options.launch_here, .timeout_ms = options.timeout_ms}),
        library_(comm_.library()) {
    const CudaDeviceScope scope(device_);
    connect();
  }

  void all_gather_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out, void* stream) override {
    begin_call();
    Call call(rank_, ranks_);
    call.set_all_gather(in, counts, out);
    check_dense(call);
    const auto bytes = static_cast<std::size_t>(counts[rank_] * call.row_bytes());
    const CudaDeviceScope scope(device_);
    if (std::all_of(counts.begin(), counts.end(), [&](std::int64_t count) { return count == counts[0]; })) {
      if (bytes > 0) settle("ncclAllGather", library_.all_gather(in.data, out.data, bytes, nccl::kBytes, comm_.get(), as_stream(stream)));
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
    if (bytes > 0) note(library_.send(rows, static_cast<std::size_t>(bytes), nccl::kBytes, to, comm_.get(), stream));
  }
  void receive(std::byte* rows, std::int64_t bytes, int from, cudaStream_t stream) {
    if (bytes > 0) note(library_.recv(rows, static_cast<std::size_t>(bytes), nccl::kBytes, from, comm_.get(), stream));
  }
  void copy_own(const Call& call, cudaStream_t stream) const;
  template <class Enqueue>
  void group(Enqueue&& enqueue);
  void note(Result result) {
    if (result != Result::success && result != Result::in_progress && first_ == Result::success) first_ = result;
  }
  void settle(const char* what, Result result);
  void keep(Expected<void> result);
  int peer_after(int steps) const { return (rank_ + steps) % ranks_; }
  int peer_before(int steps) const { return (rank_ + ranks_ - steps) % ranks_; }

  World world_;
  int rank_;
  int ranks_;
  int device_;
  DeviceBuffer partials_;  // of reduce_scatter_v; freed when nothing of the communicator's is under way any more
  nccl::Communicator comm_;
  const Library& library_;
  std::uint64_t call_number_ = 1;   // connecting is the first
  Result first_ = Result::success;  // the first error of a group
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
  settle("ncclAllGather", library_.all_gather(words.data() + rank_, words.data(), 1, nccl::kBytes, comm_.get(), stream.get()));
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

void NcclCollectives::settle(const char* what, Result result) { keep(comm_.settle(what, result)); }

void NcclCollectives::wait_until(const std::function<bool()>& done) {
  if (gave_up_) throw TransportError(*gave_up_);
  keep(comm_.wait_until(done));
}

void NcclCollectives::keep(Expected<void> result) {
  if (result) return;
  gave_up_ = std::move(result.error());
  gave_up_->epoch = call_number_;
  throw TransportError(*gave_up_);
}

}  // namespace

std::unique_ptr<DeviceCollectives> make_nccl(const World& world, const DeviceCollectiveOptions& options) {
  const int device = device_of(options);
  const nccl::UniqueId id = nccl::agree(world, device, objection(options), Phase::collective);
  return std::make_unique<NcclCollectives>(world, options, device, id);
}

}  // namespace tokenyard::collective_internal
