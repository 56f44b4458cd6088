#pragma once
// The exchange on GPUs: the host numbers, checks and enqueues; kernels count, move, wait, fold and sum. No call waits for the
// device, but those with Sizing::exact for their counts.

#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "exchange/cuda_trace.h"
#include "exchange/device_arena.h"
#include "exchange/device_handle.h"
#include "exchange/exchange_engine.h"
#include "exchange/lease_board.h"
#include "exchange/row_transport.h"
#include "memory/cuda_stream.h"
#include "memory/sm_budget.h"
#include "world/lost_watch.h"

namespace tokenyard::exchange_internal {

// A placement's tables in device memory.
struct DeviceTable {
  DeviceBuffer memory;
  placement_internal::TableView view;
  const std::int32_t* shard_ordinals = nullptr;  // [L]
};

// Memory of rows that do not stay where they landed.
struct OutputRows {
  std::byte* rows = nullptr;
  std::byte* scales = nullptr;
  std::shared_ptr<void> lease;  // null: the caller's
};

// A dispatch that is checked, with everything it needs, and then enqueued.
struct CudaDispatch {
  DispatchInput input;
  DispatchOptions options;
  LayoutOptions layout_options;
  protocol::CallHeader header;
  std::shared_ptr<DeviceHandle> handle;  // of a cached dispatch: the old one
  bool cached = false;
  std::optional<RowSource> source;
  int buffer = 0;
  std::shared_ptr<void> lease;
  int expert_buffer = 0;  // unless in place or copied out
  std::shared_ptr<void> expert_lease;
  bool in_place = false;      // rows are used where they land
  bool pads = false;          // the kernel that lands rows also lays them out and copies them
  bool sorts_beside = false;  // rows go by bulk copies, beside which they may be laid out, and own ones placed at once
  bool places_own = false;    // this rank's own rows go straight to their places
  std::optional<OutputRows> output;
};
enum class Halves : std::uint8_t { together, apart };  // start and finish

class CudaEngine final : public ExchangeEngine {
 public:
  CudaEngine(const World& world, const ExchangeOptions& options);
  ~CudaEngine() override;

  Received dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached) override;
  Combined combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) override;
  Pending<Received> start_dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached) override;
  Pending<Combined> start_combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) override;
  CombineGradient combine_backward(const Handle& handle, const ConstTensorView& grad_out, const ConstTensorView& y,
                                   const CombineOptions& options) override;
  TensorView expert_rows(const Handle& handle, Dtype dtype, std::int64_t hidden_size, void* stream) override;
  void abandon(const std::string& reason) override;
  void check() const override;
  ExchangeStatus status() const override;
  void clear() override;
  std::vector<int> recover() override;
  Transport transport() const override { return arena_->transport(); }
  std::vector<std::int64_t> link_bytes() const override { return arena_->link_bytes(); }
  std::vector<PhaseSpan> take_spans() override;

 private:
  // What a combine without rows brings back (Exchange::combine_backward).
  struct WeightGradient {
    TensorView grad_rows;
    ConstTensorView y;
  };

  void wait_idle() override;
  void placements_changed() override;
  void make_scratch();
  // Runs `make`; a call that it rejects is told to the peers.
  template <class Make>
  auto admit(cudaStream_t stream, Make&& make) {
    check();
    ++last_call_;
    try {
      return make();
    } catch (const std::exception& error) {
      reject(stream, error.what());
      throw;
    }
  }
  void reject(cudaStream_t stream, const std::string& reason);
  // What the kernels of a call know that adds its waits there.
  cuda::Context context(const TensorView& waits) const;
  // `launch` enqueues one phase of the call under way.
  template <class Launch>
  void phase(const char* name, cudaStream_t stream, Launch&& launch) {
    const CudaTrace::Phase span(trace_, name, last_call_, stream);
    launch();
  }

  CudaDispatch make_dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached, Halves halves);
  void check_dispatch_memory(const CudaDispatch& job) const;
  void lease_buffer(CudaDispatch& job);
  // Everything up to the received rows; then, when the host knows as much as it must, what becomes of them.
  void enqueue_dispatch(CudaDispatch& job, cudaStream_t stream);
  Received finish_dispatch(CudaDispatch& job, cudaStream_t stream);
  OutputRows place_output(const CudaDispatch& job, cudaStream_t stream);
  cuda::SpreadArgs spread_args(const CudaDispatch& job) const;
  std::int64_t expert_capacity(const CudaDispatch& job) const;
  cuda::GroupArgs group_args(const CudaDispatch& job) const;
  cuda::OwnRows own_rows(const CudaDispatch& job) const;
  cuda::LayoutArgs layout_args(const CudaDispatch& job) const;
  cuda::PlanArgs plan_args(const CudaDispatch& job) const;
  cuda::MoveArgs move_args(const CudaDispatch& job, bool last) const;
  std::byte* expert_memory(int buffer, std::int64_t bytes, cudaStream_t stream);
  // Behind whatever still reads the buffers that the dispatch is about to fill.
  void enter_buffers(const CudaDispatch& job, cudaStream_t stream);
  // Its rows are used on this stream, and no longer where it was enqueued.
  void continue_on(const CudaDispatch& job, cudaStream_t stream);
  cuda::RoutingArgs routing_args(const CudaDispatch& job) const;
  cuda::SourceArgs source_args(const CudaDispatch& job) const;
  LayoutOptions layout_options(const DispatchOptions& options, int placement) const;
  // Until the counts of an exact dispatch are known, or it has failed.
  cuda::HostCounts await_counts(const DeviceHandle& handle);

  cuda::CombineArgs make_combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) const;
  Combined enqueue_combine(cuda::CombineArgs args, const Handle& handle, const CombineOptions& options, cudaStream_t stream);
  void push_and_sum(const cuda::CombineArgs& args, cudaStream_t stream);
  void bring_to_expert_rows(cuda::CombineArgs& args, const DeviceHandle& handle, cudaStream_t stream);
  CombineGradient enqueue_weight_gradient(const Handle& handle, CombineGradient gradient, const ConstTensorView& y,
                                          const CombineOptions& options);
  void wait_for_reads(const cuda::Context& context, cudaStream_t stream);

  Failure describe_failure(const protocol::ErrorRecord& record) const;
  std::string describe_mismatch(const protocol::ErrorRecord& record) const;

  int device_ = 0;
  SmBudget budget_;
  std::unique_ptr<DeviceArena> arena_;
  std::vector<std::unique_ptr<DeviceArena>> lost_arenas_;  // late stores of a lost rank end there
  std::unique_ptr<LostWatch> watch_;
  std::shared_ptr<BlockPool> blocks_;
  std::shared_ptr<CountsPool> counts_pool_;
  std::shared_ptr<LeaseBoard> receive_board_;
  std::shared_ptr<LeaseBoard> expert_board_;
  struct ExpertMemory {
    std::shared_ptr<std::byte> data;
    std::int64_t bytes = 0;
  };
  std::vector<ExpertMemory> expert_memory_;                      // [depth], of the expert layouts
  std::set<std::shared_ptr<std::byte>> captured_expert_memory_;  // replays use it, also when it has grown since
  struct BufferOrders {
    std::vector<MemoryOrder> receive, expert;  // [depth]
  };
  std::shared_ptr<BufferOrders> orders_;  // leases that outlive the exchange still come back
  DeviceBuffer scratch_;
  cuda::RowNumbers row_numbers_;
  std::int32_t* counts_ = nullptr;
  std::int32_t *own_counts_ = nullptr, *own_places_ = nullptr;
  cuda::LayoutTable layout_table_;
  DeviceBuffer groups_;
  std::vector<DeviceTable> tables_;
  std::shared_ptr<CUstream_st> stream_;  // of calls in two halves
  CudaEvent entered_;
  CallOrder order_;
  CudaTrace trace_;
  std::uint64_t last_call_ = 0;  // for texts; the device has its own count
};

}  // namespace tokenyard::exchange_internal
