#pragma once
// Collectives with unequal lengths over rows. Counts are rows per rank, zeros legal, equal on all ranks where stated.

#include <cstdint>
#include <memory>
#include <span>

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

}  // namespace tokenyard
