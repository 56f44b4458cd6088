#pragma once
// The exchange over MPI as it is commonly written: every row that leaves is packed per destination (once: deduplicated), counts
// cross, then rows and records cross in all-to-all-v, and what arrives is unpacked to its slot; back the same way. The rows that
// stay on their rank go through it like all others. It is measured beside Transport::mpi, which leaves out what it can.

#include <cstddef>
#include <memory>
#include <vector>

#include "core/thread_pool.h"
#include "exchange/row_memory.h"
#include "exchange/send_plan.h"
#include "tokenyard/collective.h"
#include "tokenyard/exchange.h"

namespace tokenyard::cli {

class PlainExchange {
 public:
  struct Shape {
    std::int64_t max_tokens = 0;  // per rank
    std::int64_t row_bytes = 0;   // of dispatched rows and of y
    Layout layout = Layout::token_major;
    int timeout_ms = 0;
  };
  // Whether it can stand beside the exchange: one dense row per (source rank, token), no scales.
  static bool serves(Layout layout, std::int64_t scale_bytes) {
    return scale_bytes == 0 && (layout == Layout::token_major || layout == Layout::rank_slots);
  }

  // Collective. The pool outlives it.
  PlainExchange(const World& world, const Placement& placement, const Shape& shape, ThreadPool& pool);
  // Afterwards rows() holds what Received::rows would, row by row.
  void dispatch(const DispatchInput& input);
  const std::byte* rows() const { return rows_.data.get(); }
  std::int64_t num_rows() const { return total(received_); }
  // y as rows(), in `dtype`; out [T,H] in `dtype`, summed as Exchange::combine does. Of the last dispatch.
  void combine(const std::byte* y, Dtype dtype, const TensorView& out);

 private:
  using Counts = std::vector<std::int64_t>;
  static std::int64_t total(const Counts& counts);
  static Counts starts(const Counts& counts);
  std::byte* at(const exchange_internal::RowMemory& memory, std::int64_t row) const { return memory.data.get() + row * shape_.row_bytes; }
  std::byte* record(const exchange_internal::RowMemory& memory, std::int64_t row) const { return memory.data.get() + row * record_bytes_; }
  void pack(const DispatchInput& input);
  void exchange(const exchange_internal::RowMemory& in, const Counts& send, const exchange_internal::RowMemory& out, const Counts& receive,
                std::int64_t row_bytes);
  // fn(arrived, slot): where the row that arrived as number `arrived` belongs.
  template <class Fn>
  void for_each_arrived(Fn&& fn);
  void unpack_records();

  const std::unique_ptr<Collectives> collectives_;
  const Placement placement_;
  const Shape shape_;
  ThreadPool& pool_;
  const int rank_;
  const int ranks_;
  protocol::ArenaShape arena_;
  std::int64_t record_bytes_ = 0;
  exchange_internal::SendPlan plan_;
  Counts sent_, received_;
  exchange_internal::RowMemory packed_, arrived_, rows_, packed_records_, arrived_records_;
  // What a caller learns of the received rows: [N] and [N,K].
  std::vector<std::int32_t> source_token_, local_ids_;
  std::vector<float> weights_;
};

}  // namespace tokenyard::cli
