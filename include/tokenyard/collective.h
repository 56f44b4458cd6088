#pragma once
// Collectives with unequal lengths over rows. Counts are rows per rank, zeros legal, equal on all ranks where stated.

#include <cstdint>
#include <memory>
#include <span>

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
// TransportError(mismatch) when ranks made different calls. UsageError for shapes and counts that do not fit.
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
  // send_counts[d] rows of in, ordered by d, go to rank d; out takes receive_counts[s] rows from each s, ordered by s.
  virtual void all_to_all_v(const ConstTensorView& in, std::span<const std::int64_t> send_counts, const TensorView& out,
                            std::span<const std::int64_t> receive_counts) = 0;
  virtual const World& world() const = 0;
  virtual Transport transport() const = 0;
};

}  // namespace tokenyard
