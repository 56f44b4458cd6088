#pragma once
// The exchange: dispatch sends rows to the ranks that hold their experts, combine brings sums back.
// Letters in shapes: T tokens of this rank, H hidden size, K top_k, R ranks, L local experts, N rows received.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tokenyard/error.h"
#include "tokenyard/options.h"
#include "tokenyard/placement.h"
#include "tokenyard/world.h"

namespace tokenyard {

namespace exchange_internal {
class ExchangeEngine;
struct HandleFacts;
struct ReceivedState;
template <class State>
struct PendingState;
}  // namespace exchange_internal

// What one dispatch learned, and combine needs. Owns its memory; copies share it; reusable any number of times.
class Handle {
 public:
  Handle() = default;
  explicit Handle(std::shared_ptr<const exchange_internal::HandleFacts> state) : state_(std::move(state)) {}
  explicit operator bool() const { return state_ != nullptr; }
  Layout layout() const;
  Mode mode() const;
  int placement() const;
  std::int64_t num_tokens() const;                // T
  std::int64_t num_rows() const;                  // N, token rows received; -1 on cuda with Sizing::capacity
  std::span<const std::int64_t> dropped() const;  // [L]: rows dropped per local expert; on cuda this waits for the device
  const std::shared_ptr<const exchange_internal::HandleFacts>& state() const { return state_; }

 private:
  std::shared_ptr<const exchange_internal::HandleFacts> state_;
};

// The rows of one dispatch. Unless copied out they are a lease on a receive buffer, valid until release() or destruction.
// Metadata belongs to the handle and outlives the lease. All indices int32; -1, and weight 0, where there is no row.
// On cuda all tensors are in device memory and valid in the order of the stream given to the dispatch.
// That stream, and a combine's, lives until what was made on it (rows, sums, handles) is gone: an event is recorded there then.
class Received {
 public:
  Received() = default;
  explicit Received(std::shared_ptr<exchange_internal::ReceivedState> state) : state_(std::move(state)) {}
  TensorView rows() const;    // [N,H] | [N',H] | [L,C,H] | [R,M,H]; dtype and H of the input
  TensorView scales() const;  // the same with S instead of H
  // N (token_major, rank_slots), N' with padding (expert_major), sum of counts (expert_padded). On cuda with Sizing::capacity
  // only the device knows: -1 here, and a [1] int32 tensor there.
  std::int64_t num_rows() const;
  ConstTensorView num_rows_device() const;
  ConstTensorView local_ids() const;    // token_major [N,K], rank_slots [R,M,K]
  ConstTensorView row_weights() const;  // [N,K], [R,M,K], [N'], [L,C]
  ConstTensorView source_rank() const;  // [N], [N'], [L,C]
  ConstTensorView source_token() const;
  ConstTensorView source_k() const;        // expert layouts
  ConstTensorView expert_counts() const;   // [L]: rows of each local expert, without padding and drops
  ConstTensorView expert_offsets() const;  // [L+1]: expert_major (aligned), token_major with gather map
  ConstTensorView expert_rows() const;     // the gather map: row indices grouped by local expert, order (source rank, token, k)
  ConstTensorView rank_counts() const;     // [R]: rows from each source
  ConstTensorView sent_counts() const;     // [R]: rows this rank sent to each destination
  ConstTensorView ranges() const;          // expert_padded [L,R,2] = (begin, count) within the expert
  ConstTensorView present() const;         // rank_slots [R,M] uint8
  const Handle& handle() const;
  // Gives the rows back. On cuda what reads them must be on the stream of the dispatch, or on `stream` (a cudaStream_t).
  void release(void* stream = nullptr);
  // cuda: rows are read on this stream (a cudaStream_t), too: when they are given back, their memory waits for what is there then.
  void read_on(void* stream);

 private:
  std::shared_ptr<exchange_internal::ReceivedState> state_;
};

struct Combined {
  TensorView out;                // [T,H]
  TensorView combined_weights;   // [T,K] float32, when row_weights was given
  std::shared_ptr<void> memory;  // keeps what the exchange allocated alive
};

// Started and not yet finished. finish() waits (with the exchange's deadline) and hands over the result, once; on an
// empty one it is a UsageError. Inputs stay untouched by the caller until then. Destroying it abandons the result, not the operation.
template <class Result>
class Pending {
 public:
  Pending() = default;
  explicit Pending(std::shared_ptr<exchange_internal::PendingState<Result>> state) : state_(std::move(state)) {}
  Result finish();
  bool ready() const;
  explicit operator bool() const { return state_ != nullptr; }

 private:
  std::shared_ptr<exchange_internal::PendingState<Result>> state_;
};

struct DispatchGradient {
  TensorView rows;          // [T,H]
  TensorView topk_weights;  // [T,K] float32, when the gradient of row_weights was given
  std::shared_ptr<void> memory;
};
struct CombineGradient {
  Received rows;            // grad of y, in the layout of the dispatch (w * g, rounded once)
  TensorView topk_weights;  // [T,K] float32, with at_expert and at_source: sum over H of g * y
  std::shared_ptr<void> memory;
};

// Bytes for one purpose, and the formula behind them.
struct MemoryItem {
  std::string purpose;
  std::int64_t bytes = 0;
  std::string formula;
};
struct MemoryPlan {
  std::vector<MemoryItem> items;
  std::int64_t total() const;
};

// One phase of one call, for timelines. Nanoseconds of the steady clock.
struct PhaseSpan {
  std::string phase;
  std::uint64_t call = 0;
  std::int64_t begin_ns = 0;
  std::int64_t end_ns = 0;
};

// Nanoseconds [R] in which a rank had nothing to do but wait for a rank's counts, rows, weights, partial sums, or buffers. What it waits
// for of several ranks at once counts for each of them; for itself it never waits. On cuda many wait at once while others move rows: in
// throughput mode the block counts that waits for all ranks, in latency mode, for rows, whoever waits for the last one of a rank.
struct PeerWaits {
  std::vector<std::int64_t> dispatch;
  std::vector<std::int64_t> combine;
};

// What an exchange knows about its own health.
struct ExchangeStatus {
  std::optional<Failure> failure;  // sticky, until clear()
  std::int64_t invalid_ids = 0;    // ids >= E that dispatches without options.validate took as no expert
  std::int64_t lost_ids = 0;       // ids of experts that recover() left without an instance: they contributed zero
};

// Owns arena, epochs and links for a maximum shape. Calls on one exchange are externally serialised, and all ranks make them in
// the same order. UsageError: this call was rejected, peers fail it with the reason, the next call is fine. TransportError:
// sticky, every later call repeats it until clear().
class Exchange {
 public:
  // Collective. UsageError for options that cannot work, TransportError(mismatch) when ranks differ.
  Exchange(const World& world, const ExchangeOptions& options);
  ~Exchange();  // local, never collective
  Exchange(Exchange&&) noexcept;
  Exchange& operator=(Exchange&&) noexcept;

  // Collective: registers a placement, agreed by hash; returns its number.
  int add(const Placement& placement);

  Received dispatch(const DispatchInput& input, const DispatchOptions& options = {});
  // Cached: rows [T,H] along the routing of an earlier dispatch, same layout, no counts.
  Received dispatch(const DispatchInput& input, const Handle& handle, const DispatchOptions& options = {});
  Combined combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options = {});

  // The same in two halves; start never blocks.
  Pending<Received> start_dispatch(const DispatchInput& input, const DispatchOptions& options = {});
  Pending<Received> start_dispatch(const DispatchInput& input, const Handle& handle, const DispatchOptions& options = {});
  Pending<Combined> start_combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options = {});

  // grad_rows in the layout of the dispatch; grad_row_weights optional, shaped as row_weights of that layout. On cuda on the
  // stream of the dispatch.
  DispatchGradient dispatch_backward(const Handle& handle, const ConstTensorView& grad_rows, const ConstTensorView& grad_row_weights = {});
  // grad_out [T,H]; y is what was combined (needed for at_expert and at_source).
  CombineGradient combine_backward(const Handle& handle, const ConstTensorView& grad_out, const ConstTensorView& y = {},
                                   const CombineOptions& options = {});

  // Memory for y from which peers pull without a copy: [rows,H] for the next combine on this handle, token_major and
  // rank_slots. Waits until peers have read what the last combine left there. UsageError without options.expert_rows.
  // On cuda the wait is enqueued on `stream` (a cudaStream_t).
  TensorView expert_rows(const Handle& handle, Dtype dtype, std::int64_t hidden_size, void* stream = nullptr);

  // Instead of this rank's next call, which it cannot make: peers in that call fail with the reason, and the one after is fine.
  void abandon(const std::string& reason);

  // Throws the sticky error, if any.
  void check() const;
  ExchangeStatus status() const;
  // Collective: ends an error on all ranks (none of which may be lost); leases stay valid.
  void clear();
  // Collective over the ranks that are left, after some were lost or stopped answering: they meet through the store, build
  // new memory and go on as a smaller world (world()), numbered in the old order, with what is left of every placement
  // (Placement::restricted_to). Returns the former rank of each rank. Handles from before are refused; leases stay valid.
  std::vector<int> recover();

  const World& world() const;
  const ExchangeOptions& options() const;  // with defaults filled in
  Transport transport() const;             // what automatic became
  // Bytes of rows and scales sent to each rank so far (self included, both directions).
  std::vector<std::int64_t> link_bytes() const;
  // How long this rank has waited for each rank so far. Empty over MPI, and on cuda: see DispatchOptions::waits.
  PeerWaits peer_waits() const;
  std::vector<PhaseSpan> take_spans();  // since the last call; empty without options.trace

  // Without allocating, on any machine.
  static MemoryPlan memory_plan(const ExchangeOptions& options, int ranks);

 private:
  std::unique_ptr<exchange_internal::ExchangeEngine> engine_;
};

}  // namespace tokenyard
