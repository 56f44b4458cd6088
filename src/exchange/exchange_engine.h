#pragma once
// What stands behind Exchange: one engine per device kind. The base holds what they share: options, placements, agreement.

#include <functional>
#include <memory>
#include <vector>

#include "exchange/handle_facts.h"
#include "protocol/arena.h"
#include "tokenyard/exchange.h"

namespace tokenyard::exchange_internal {

struct ReceivedState {
  Handle handle;
  TensorView rows;
  TensorView scales;
  std::shared_ptr<void> lease;             // of a receive buffer, of expert memory, or the memory itself
  std::function<void(void*)> before_free;  // cuda: told the stream on which rows are still read
  std::vector<void*> readers;              // cuda: such streams

  ReceivedState() = default;
  ReceivedState(const ReceivedState&) = delete;
  ReceivedState& operator=(const ReceivedState&) = delete;
  ~ReceivedState();
  void give_back(void* stream);
};

template <class Result>
struct PendingState {
  std::function<Result()> finish;  // empty once finished
  std::function<bool()> ready;
};

// A placement as this rank sees it.
struct RegisteredPlacement {
  Placement placement;
  std::vector<std::int32_t> shard_ordinals;  // [L]: this rank's place, ascending, among the shards of the replica it serves
};
RegisteredPlacement registered(const Placement& placement, int rank);

class ExchangeEngine {
 public:
  virtual ~ExchangeEngine() = default;

  int add(const Placement& placement);
  virtual Received dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached) = 0;
  virtual Combined combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) = 0;
  virtual Pending<Received> start_dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached) = 0;
  virtual Pending<Combined> start_combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) = 0;
  virtual CombineGradient combine_backward(const Handle& handle, const ConstTensorView& grad_out, const ConstTensorView& y,
                                           const CombineOptions& options) = 0;
  virtual TensorView expert_rows(const Handle& handle, Dtype dtype, std::int64_t hidden_size, void* stream) = 0;
  // An engine that has no words of its own for it rejects a call without input.
  virtual void abandon(const std::string& reason);
  virtual void check() const = 0;
  virtual ExchangeStatus status() const = 0;
  virtual void clear() = 0;
  virtual std::vector<int> recover() = 0;
  virtual Transport transport() const = 0;
  virtual std::vector<std::int64_t> link_bytes() const = 0;
  virtual PeerWaits peer_waits() const { return {}; }
  virtual std::vector<PhaseSpan> take_spans() = 0;

  const World& world() const { return world_; }
  const ExchangeOptions& options() const { return options_; }
  const protocol::ArenaShape& shape() const { return shape_; }
  std::uint64_t id() const { return id_; }
  const std::vector<RegisteredPlacement>& placements() const { return placements_; }

 protected:
  // Collective: all ranks learn whether their options agree.
  ExchangeEngine(const World& world, const ExchangeOptions& options);
  // Waits until no call is under way.
  virtual void wait_idle() = 0;
  // After a placement was added, or all of them changed.
  virtual void placements_changed() {}
  // The world that is left: options, shape, number and placements of this rank in it.
  void shrink_to(const Survivors& left, const ExchangeOptions& options);
  // The options of that world; groups keep their order and close their gaps.
  ExchangeOptions options_without_lost(const std::vector<int>& survivors) const;
  // The placement of a call: the handle's, or the one that the options name.
  int placement_of(const DispatchOptions& options, const HandleFacts* cached) const;

  World world_;
  ExchangeOptions options_;
  protocol::ArenaShape shape_;
  std::uint64_t id_;
  std::vector<RegisteredPlacement> placements_;

 private:
  void agree_on_options();
};

// Collective.
std::unique_ptr<ExchangeEngine> make_cpu_engine(const World& world, const ExchangeOptions& options);
// UsageError where it is not built.
std::unique_ptr<ExchangeEngine> make_cuda_engine(const World& world, const ExchangeOptions& options);

// Checks of arguments; UsageError with the value, the expectation and the remedy.
void check_dispatch(const ExchangeEngine& engine, const DispatchInput& input, const DispatchOptions& options, const HandleFacts* cached);
void check_values(const ExchangeEngine& engine, const DispatchInput& input, int placement);
void check_combine(const ExchangeEngine& engine, const ConstTensorView& y, const HandleFacts& handle, const CombineOptions& options);
void check_handle(const ExchangeEngine& engine, const Handle& handle);
// The bytes of one row for Exchange::expert_rows.
std::int64_t check_expert_rows(const ExchangeEngine& engine, const Handle& handle, Dtype dtype, std::int64_t hidden_size);
// Columns of topk_ids.
int top_k_of(const ConstTensorView& topk_ids);

}  // namespace tokenyard::exchange_internal
