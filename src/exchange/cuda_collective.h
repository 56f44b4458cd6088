#pragma once
// The exchange on GPUs over collectives alone: what is measured beside every benchmark on GPUs. Rows are deduplicated and cross in
// one all_to_all_v; library calls take counts of the host, so a dispatch waits for the device once.
//
// As fast as that can be: rows land where they stay, this rank's own rows are packed to where they land, y is sent from where it
// is, the host waits while rows are packed, and all memory is there from the start.

#include <memory>
#include <vector>

#include "kernels/cuda/collective.h"
#include "memory/cuda_buffer.h"
#include "tokenyard/collective.h"
#include "tokenyard/exchange.h"

namespace tokenyard::exchange_internal {

class CudaCollectiveExchange {
 public:
  // Collective. Of the options it heeds max_tokens_per_rank, max_row_bytes, max_scale_bytes, top_k, device_index and timeout_ms.
  // What it cannot serve is a UsageError, for which peers wait until their deadline.
  CudaCollectiveExchange(const World& world, const Placement& placement, const ExchangeOptions& options);
  CudaCollectiveExchange(const CudaCollectiveExchange&) = delete;
  CudaCollectiveExchange& operator=(const CudaCollectiveExchange&) = delete;

  // token_major without gather map, shapes exact. Rows and metadata are this object's, until its next dispatch.
  Received dispatch(const DispatchInput& input, void* stream);
  // y [N,H], folded by the caller, in the order of the last dispatch; out [T,H]. Sums by Order::rank_ascending. Does not wait.
  void combine(const ConstTensorView& y, const TensorView& out, void* stream);

  // The host waits for the stream, with the deadline.
  void wait(void* stream) { collectives_->wait(stream); }
  std::string library_version() const { return collectives_->library_version(); }

 private:
  using Counts = std::vector<std::int64_t>;  // rows per rank

  struct Metadata {
    std::int32_t* source_rank = nullptr;
    std::int32_t* source_token = nullptr;
    std::int32_t* local_ids = nullptr;
    float* weights = nullptr;
    std::int32_t* expert_counts = nullptr;
    std::int32_t* rank_counts = nullptr;
    std::int32_t* sent_counts = nullptr;
  };

  template <class T>
  T* allocate(std::int64_t count) {
    memory_.push_back(value_or_throw(make_device_buffer(device_, static_cast<std::size_t>(count) * sizeof(T))));
    return memory_.back().as<T>();
  }
  void allocate_plan();
  void allocate_rows();
  void check_input(const DispatchInput& input) const;
  cuda::RoutingArgs routing_args(const DispatchInput& input) const;
  cuda::SourceArgs source_args(const DispatchInput& input) const;
  void gather_counts(void* stream);
  void await_counts();
  void exchange_rows(const cuda::SourceArgs& source, int top_k, void* stream);
  void land(int top_k, cuda::Stream stream);
  Received received(const DispatchInput& input, int top_k, void* stream) const;
  static std::int64_t total(const Counts& counts);
  Counts without_own(Counts counts) const;

  World world_;
  int rank_;
  int ranks_;
  int device_;
  Placement placement_;
  ExchangeOptions options_;
  std::unique_ptr<DeviceCollectives> collectives_;
  std::vector<DeviceBuffer> memory_;
  PinnedBuffer pinned_;  // cuda::CollectiveCounts
  cuda::CollectivePlan plan_;
  placement_internal::TableView table_;  // device pointers
  cuda::CollectiveTables packed_;        // combine: rows are what came back
  cuda::CollectiveTables landed_;
  Metadata metadata_;
  std::uint64_t call_ = 0;
  std::int64_t tokens_ = 0;  // of the last dispatch, like the counts
  Counts sent_, received_;
};

}  // namespace tokenyard::exchange_internal
