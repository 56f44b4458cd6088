#pragma once
// The exchange without its transport: numbering and order of calls, plans, layouts, folds and sums, and what happens
// when something fails.

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "core/thread_pool.h"
#include "exchange/exchange_engine.h"
#include "exchange/handle_state.h"
#include "exchange/layout.h"
#include "exchange/lease_board.h"
#include "exchange/row_memory.h"
#include "exchange/row_transport.h"
#include "exchange/store_choice.h"
#include "tokenyard/exchange.h"

namespace tokenyard::exchange_internal {

struct DispatchJob {
  DispatchInput input;
  DispatchOptions options;
  std::shared_ptr<const HandleState> cached;
  protocol::CallHeader header;
  std::optional<RowSource> source;
  int placement = 0;
  bool holds_receive_buffer = false;  // promised and not yet leased
  bool holds_expert_buffer = false;

  Layout layout() const { return static_cast<Layout>(header.layout); }
  Mode mode() const { return static_cast<Mode>(header.mode); }
  // Whether rows can be used where they landed.
  bool in_place() const {
    return !options.copy_out && (layout() == Layout::rank_slots || (layout() == Layout::token_major && mode() == Mode::throughput));
  }
};

// What a combine without rows brings back (Exchange::combine_backward).
struct WeightGradient {
  TensorView grad_rows;  // in: the gradient of every row; out: times its weight
  ConstTensorView y;
};

struct CombineJob {
  ConstTensorView y;  // absent: only weights travel
  std::shared_ptr<const HandleState> handle;
  CombineOptions options;
  protocol::CallHeader header;
  std::optional<WeightGradient> gradient;
};

class Engine final : public ExchangeEngine {
 public:
  Engine(const World& world, const ExchangeOptions& options);
  ~Engine() override;

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
  Transport transport() const override { return transport_->transport(); }
  std::vector<std::int64_t> link_bytes() const override { return transport_->link_bytes(); }
  PeerWaits peer_waits() const override { return transport_->peer_waits(); }
  std::vector<PhaseSpan> take_spans() override;

 private:
  // Adds what this rank waits for each rank, from construction to destruction, to a tensor of the caller. Calls run one after the other.
  class WaitMeter {
   public:
    WaitMeter(const RowTransport& transport, protocol::Operation operation, const TensorView& waits);
    ~WaitMeter();
    WaitMeter(const WaitMeter&) = delete;
    WaitMeter& operator=(const WaitMeter&) = delete;

   private:
    std::vector<std::int64_t> waited() const;
    const RowTransport& transport_;
    protocol::Operation operation_;
    TensorView waits_;
    std::vector<std::int64_t> before_;
  };

  // Records one span from construction to destruction.
  class Span {
   public:
    Span(Engine& engine, const char* phase, std::uint64_t call);
    ~Span();

   private:
    Engine& engine_;
    PhaseSpan span_;
  };

  // Numbers a new call and makes its job; a call that is rejected with UsageError is told to the peers.
  template <class Make>
  auto admit(Make&& make);
  template <class Result, class Job>
  Pending<Result> start(Job job);
  void enqueue(std::function<void()> task);
  bool is_idle();
  void wait_idle() override;
  void work();

  DispatchJob make_dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached, std::uint64_t call);
  void reserve_buffers(DispatchJob& job);
  CombineJob make_combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options, std::uint64_t call);
  Received execute(DispatchJob& job);
  Combined execute(CombineJob& job);
  // Runs the steps of a call.
  template <class Result, class Steps>
  Result guarded(const protocol::CallHeader& header, Steps&& steps);
  // Ends a call: its failure is told to the peers, becomes sticky (unless the call was aborted) and is thrown.
  [[noreturn]] void fail(const protocol::CallHeader& header, Failure failure);

  Expected<Received> dispatch_steps(DispatchJob& job);
  Expected<std::shared_ptr<HandleState>> plan_dispatch(const DispatchJob& job);
  Expected<void> decide_overflow(const DispatchJob& job, std::span<const std::int32_t> counts) const;
  LayoutOptions layout_options(const DispatchJob& job) const;
  void collect(HandleState& handle, const Landing& landing) const;
  Expected<Received> assemble(DispatchJob& job, const std::shared_ptr<const HandleState>& handle, Landing landing);
  Expected<void> place_output(DispatchJob& job, const HandleState& handle, ReceivedState& state);
  void fill_output(const DispatchJob& job, const HandleState& handle, const Landing& landing, const ReceivedState& state);

  Expected<Combined> combine_steps(CombineJob& job);
  Expected<std::vector<float>> fold_weights(const CombineJob& job, const CombineCall& call);
  void fold_remote(const CombineJob& job, const CombineCall& call, const RowTransport::PartialTargets& targets,
                   const std::vector<float>& weights);
  void return_weights(const CombineJob& job, const RowTransport::PartialTargets& targets) const;
  void sum_tokens(const CombineJob& job, const CombineCall& call, const RowTransport::PartialSources& sources,
                  const std::vector<float>& weights, const TensorView& out);
  // The caller's weight for received row i (from `source`) and k; 0 where the row was dropped.
  float row_weight(const CombineJob& job, std::int64_t i, int source, int k) const;
  void sum_weights(const CombineJob& job, const RowTransport::PartialSources& sources, const TensorView& out) const;
  void differentiate(CombineJob& job, const std::vector<float>& weights, std::vector<float>& row_gradient);

  ThreadPool pool_;
  std::unique_ptr<RowTransport> transport_;
  StoreChoice store_choice_;  // of partial sums
  std::uint64_t last_call_ = 0;
  std::shared_ptr<LeaseBoard> expert_board_;
  std::vector<RowMemory> expert_memory_;  // [depth], of the expert layouts

  mutable std::mutex mutex_;  // guards what follows: the caller's thread and the worker share it
  std::condition_variable changed_;
  ExchangeStatus status_;
  std::deque<std::function<void()>> tasks_;
  bool running_ = false;
  bool closing_ = false;
  std::vector<PhaseSpan> spans_;
  std::thread worker_;
};

}  // namespace tokenyard::exchange_internal
