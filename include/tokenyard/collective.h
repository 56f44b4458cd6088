#pragma once
// Collectives with unequal lengths over rows. Counts are rows per rank, zeros legal, equal on all ranks where stated.

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "tokenyard/error.h"
#include "tokenyard/options.h"
#include "tokenyard/tensor_view.h"
#include "tokenyard/world.h"

namespace tokenyard {

struct CollectiveOptions {
  std::int64_t staging_bytes = 4 << 20;  // per pair of ranks; longer transfers go in rounds
  Transport transport = Transport::automatic;
  int timeout_ms = 100'000;
};

// Calls are externally serialised, and all ranks make them in the same order. TransportError(timeout, peer_lost) names the peer;
// TransportError(mismatch) when ranks made different calls. UsageError for shapes and counts that do not fit: peers in the same call fail
// with TransportError(aborted) and the reason. After timeout, peer_lost and system every later call repeats the error; after the
// others the next call is fine, except over MPI, where every error is final.
class Collectives {
 public:
  // Collective.
  static std::unique_ptr<Collectives> create(const World& world, const CollectiveOptions& options = {});
  virtual ~Collectives() = default;

  virtual void barrier() = 0;
  // in [counts[rank], ...] -> out [sum counts, ...], ordered by rank. counts [R], the same on all ranks. in may be its place in out.
  virtual void all_gather_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out) = 0;
  // in [sum counts, ...] -> out [counts[rank], ...]: float32 sums in rank order, rounded once (float64 stays float64).
  virtual void reduce_scatter_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out) = 0;
  // send_counts[d] rows of in, ordered by d, go to rank d; out takes receive_counts[s] rows from each s, ordered by s. When this
  // rank's own two counts are 0 and not 0, its own rows are not copied: they stay where they are in in, or already are in out.
  virtual void all_to_all_v(const ConstTensorView& in, std::span<const std::int64_t> send_counts, const TensorView& out,
                            std::span<const std::int64_t> receive_counts) = 0;

  // Instead of this rank's next call: peers in that call fail with the kind and detail of `why`, naming its peer.
  virtual void abandon(const Failure& why) = 0;
  // From any thread: a call that waits, and every later one, fails with TransportError(system) within milliseconds.
  virtual void cancel() = 0;

  virtual const World& world() const = 0;
  virtual Transport transport() const = 0;
};

struct DeviceCollectiveOptions {
  int device_index = -1;  // the GPU of this rank; -1: the current device
  // cuda_peer: by kernels over memory of GPUs that address each other. nccl: one rank per GPU. automatic: cuda_peer where all ranks
  // are on one host, else nccl. nccl_window: as cuda_peer, over windows of NCCL.
  Transport transport = Transport::automatic;
  void* nccl_communicator = nullptr;  // nccl_window: as in ExchangeOptions
  // cuda_peer and nccl_window, both the same on all ranks: per pair of ranks, longer transfers go in rounds; multiprocessors, 0: the usual.
  std::int64_t staging_bytes = 16 << 20;
  int sm_budget = 0;
  // nccl launches from the calling thread. Off, each call costs a thread of NCCL's, tens of us, and every wait has its deadline; on, a
  // peer that is lost while NCCL connects is waited for.
  bool launch_here = false;
  int timeout_ms = 100'000;
};

// One table of an all_to_all_v, as in Collectives: counts on the host.
struct AllToAllRows {
  ConstTensorView in;
  std::span<const std::int64_t> send_counts;
  TensorView out;
  std::span<const std::int64_t> receive_counts;
};

// Rows per rank that only GPUs know: [R] int32 in the memory of this rank's, the same on all ranks when the call runs. No more than `most`
// of a rank count, which the host knows and is the same on all ranks.
struct DeviceCounts {
  ConstTensorView counts{};
  std::int64_t most = 0;
};

// The same over rows in the memory of GPUs: same bits as on CPUs. Calls enqueue on `stream` (a cudaStream_t) and return; calls run one
// after the other, whatever their streams. An error of a call that was only enqueued is told by the next call, check() or wait().
// Destruction waits for what is enqueued (cuda_peer) or ends it (nccl): a barrier of the world belongs before it, once streams are done.
//
// cuda_peer: no call waits for the device, and all may be captured into graphs that are replayed any number of times, by all ranks
// alike. UsageError: peers in that call fail with TransportError(aborted) and the reason, the next call is fine. After timeout,
// peer_lost and mismatch every later call repeats the error. Rows whose bytes, addresses and strides are multiples of 16 move fastest.
// nccl: rows are dense. Of what ranks call, nothing is agreed: calls that differ end at the deadline of wait(). Errors are final.
class DeviceCollectives {
 public:
  // Collective. UsageError where the transport cannot serve these ranks and GPUs, with the reason; TransportError where that is so on
  // another rank.
  static std::unique_ptr<DeviceCollectives> create(const World& world, const DeviceCollectiveOptions& options = {});
  virtual ~DeviceCollectives() = default;

  virtual void all_gather_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out, void* stream) = 0;
  virtual void reduce_scatter_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out, void* stream) = 0;
  // nccl: all tables travel together.
  virtual void all_to_all_v(std::span<const AllToAllRows> tables, void* stream) = 0;
  // The first two with counts on the device, which no host waits for. A rank's tensor has n rows, counts[rank] <= n <= most, of which
  // the first ones count; that of all ranks has room for (R - 1) * most + n and holds theirs one behind the other: what
  // lies behind stays as it is. Not in place. UsageError over nccl.
  virtual void all_gather_v(const ConstTensorView& in, const DeviceCounts& counts, const TensorView& out, void* stream) = 0;
  virtual void reduce_scatter_v(const ConstTensorView& in, const DeviceCounts& counts, const TensorView& out, void* stream) = 0;

  // Instead of this rank's next call. cuda_peer: peers in that call fail with TransportError(aborted) and the reason, the next call is
  // fine. nccl: nobody is told, and peers end at the deadline of wait().
  virtual void abandon(const std::string& reason, void* stream) = 0;
  // The host waits until done() says so, or for what was enqueued on `stream`. TransportError(timeout, peer_lost, system): what is
  // under way ends, so that the stream goes on.
  virtual void wait_until(const std::function<bool()>& done) = 0;
  virtual void wait(void* stream) = 0;
  // Throws what is known of earlier calls; waits for nothing.
  virtual void check() = 0;

  virtual const World& world() const = 0;
  virtual Transport transport() const = 0;
  virtual std::string library_version() const = 0;  // of NCCL: "2.28.9"; cuda_peer: empty
};

}  // namespace tokenyard
