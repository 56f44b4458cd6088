#pragma once
// What a way of moving rows offers to the exchange: counts, rows, weights and partial sums to and from every rank. The
// engine plans, lays out, folds and sums; a transport only moves, and waits with a deadline.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/expected.h"
#include "exchange/handle_state.h"
#include "protocol/arena.h"
#include "protocol/call.h"
#include "tokenyard/exchange.h"

namespace tokenyard::exchange_internal {

// The rows that this rank sends, as bytes; quantised on the way when asked.
class RowSource {
 public:
  RowSource(const DispatchInput& input, const std::optional<ScaleFormat>& quantise);
  std::int64_t row_bytes() const { return row_bytes_; }
  std::int64_t scale_bytes() const { return scale_bytes_; }
  Dtype row_dtype() const { return quantise_ ? Dtype::float8_e4m3 : rows_.dtype; }
  std::int64_t hidden_size() const { return rows_.shape[1]; }
  Dtype scale_dtype() const;
  std::int64_t scale_columns() const { return scale_columns_; }

  struct Row {
    const std::byte* row;
    const std::byte* scales;  // scale_bytes, contiguous
  };
  // scratch: at least scratch_bytes(), one per thread; the result may point into it.
  Row at(std::int64_t token, std::byte* scratch) const;
  std::int64_t scratch_bytes() const { return row_bytes_ + scale_bytes_ + 64; }

 private:
  ConstTensorView rows_;
  ConstTensorView scales_;
  std::optional<ScaleFormat> quantise_;
  std::int64_t row_bytes_ = 0;
  std::int64_t scale_bytes_ = 0;
  std::int64_t scale_columns_ = 0;
};

// Where the rows of a dispatch landed. Row r of source s, counted from 0: its record lies at record index begin[s] + r; its row
// and scales at that index too, or at s * M + token in latency mode.
struct Landing {
  std::byte* rows = nullptr;
  std::byte* scales = nullptr;
  std::byte* records = nullptr;     // null when cached
  std::vector<std::int64_t> begin;  // [R]
  std::vector<std::int64_t> count;  // [R]
  std::shared_ptr<void> lease;      // whoever holds it keeps the buffer; dropping the last one lets peers write again
};

// A combine, seen by the transport.
struct CombineCall {
  protocol::CallHeader header;
  const HandleState* handle = nullptr;
  std::int64_t row_bytes = 0;                    // of one partial sum
  bool unfolded = false;                         // one partial per (token, k, shard)
  const void* y = nullptr;                       // to recognise memory that peers can pull from
  bool pullable = false;                         // the partials are y's own rows
  const std::int32_t* shard_ordinals = nullptr;  // [L]: this rank's place, ascending, among those that serve the same replica
};

class RowTransport {
 public:
  virtual ~RowTransport() = default;

  // Called first in every call, in order. Waits out what a rejected call left behind.
  virtual Expected<void> begin_call(const protocol::CallHeader& header) = 0;
  // Called last, however the call ended. A failure is told to the peers.
  virtual void end_call(const protocol::CallHeader& header, const Failure* failure) = 0;
  // This rank does not make call `call`; peers that do fail with `reason`.
  virtual void reject_call(std::uint64_t call, const std::string& reason) = 0;

  // mine: ArenaShape::count_words() of this rank; all: [R][count_words].
  virtual Expected<void> exchange_counts(const protocol::CallHeader& header, std::span<const std::int32_t> mine,
                                         std::vector<std::int32_t>& all) = 0;
  // weights: what travels with each row, [T,K] or none (1). Cached: the handle's received rows are known, no records move.
  struct RowsCall {
    protocol::CallHeader header;
    const SendPlan* plan = nullptr;
    const RowSource* source = nullptr;
    ConstTensorView weights;
    const ReceivedRows* known = nullptr;  // cached dispatch: what arrives
    Mode mode = Mode::throughput;
    Layout layout = Layout::token_major;  // for error texts: who holds a lease
    // What travels with the row of an entry of the plan.
    void write_record(std::int64_t token, std::int64_t entry, std::byte* to) const;
  };
  virtual Expected<Landing> exchange_rows(const RowsCall& call) = 0;
  // Throws UsageError when all receive buffers are held; counts dispatches started and not yet run.
  virtual void reserve_receive_buffer() = 0;
  virtual void unreserve_receive_buffer() = 0;

  // source_weights [T,K] of this rank go to where its rows went; result [N,K] of the received rows.
  virtual Expected<std::vector<float>> exchange_weights(const CombineCall& call, const ConstTensorView& source_weights) = 0;
  // Where the partial sum of a received row goes, K weights beside it; valid between begin_partials and publish_partials.
  struct PartialTargets {
    std::vector<std::byte*> partials;  // [N], or [N,K] unfolded; null for this rank's own rows, and for all when pulled
    std::vector<float*> weights;       // [N]; null for this rank's own rows
    bool pulled = false;
  };
  virtual Expected<PartialTargets> begin_partials(const CombineCall& call) = 0;
  virtual Expected<void> publish_partials(const CombineCall& call, const PartialTargets& targets) = 0;
  // Where the partial sums of this rank's tokens are, per entry of the plan; null for entries on this rank itself.
  struct PartialSources {
    std::vector<const std::byte*> partials;  // [entries], or [entries,K] unfolded
    std::vector<const float*> weights;       // [entries]
  };
  virtual Expected<PartialSources> await_partials(const CombineCall& call) = 0;
  virtual void release_partials(const CombineCall& call) = 0;

  // Memory of receive_rows rows from which peers pull; waits until they have read the last ones.
  virtual Expected<std::byte*> expert_rows() = 0;
  // Collective, after a failure: every rank starts over from the same call number, which is returned.
  virtual Expected<std::uint64_t> reset(std::uint64_t last_call) = 0;
  // Makes waits of other threads give up: the exchange is being destroyed.
  virtual void cancel() = 0;

  virtual std::vector<std::int64_t> link_bytes() const = 0;
  virtual PeerWaits peer_waits() const { return {}; }  // where it is not known whom a wait is for
  virtual Transport transport() const = 0;
};

}  // namespace tokenyard::exchange_internal
