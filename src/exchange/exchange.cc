// The public face of the exchange.

#include "tokenyard/exchange.h"

#include <utility>

#include "core/usage.h"
#include "exchange/exchange_engine.h"

namespace tokenyard {

using namespace exchange_internal;

namespace {

template <class T>
T& held(const std::shared_ptr<T>& state, const char* what) {
  if (!state) usage_error("the {} is empty (never filled, or moved from)", what);
  return *state;
}

const HandleFacts& handle_of(const std::shared_ptr<ReceivedState>& state) { return *held(state, "Received").handle.state(); }

}  // namespace

Layout Handle::layout() const { return held(state_, "Handle").layout; }
Mode Handle::mode() const { return held(state_, "Handle").mode; }
int Handle::placement() const { return held(state_, "Handle").placement; }
std::int64_t Handle::num_tokens() const { return held(state_, "Handle").num_tokens(); }
std::int64_t Handle::num_rows() const { return held(state_, "Handle").num_token_rows(); }
std::span<const std::int64_t> Handle::dropped() const { return held(state_, "Handle").dropped(); }

TensorView Received::rows() const { return held(state_, "Received").rows; }
TensorView Received::scales() const { return held(state_, "Received").scales; }
std::int64_t Received::num_rows() const { return handle_of(state_).num_rows(); }
const Handle& Received::handle() const { return held(state_, "Received").handle; }

void Received::release(void* stream) {
  ReceivedState& state = held(state_, "Received");
  state.give_back(stream);
  state.rows = {};
  state.scales = {};
}

void Received::read_on(void* stream) { held(state_, "Received").readers.push_back(stream); }

ConstTensorView Received::num_rows_device() const { return handle_of(state_).views().num_rows; }
ConstTensorView Received::local_ids() const { return handle_of(state_).views().local_ids; }
ConstTensorView Received::row_weights() const { return handle_of(state_).views().row_weights; }
ConstTensorView Received::source_rank() const { return handle_of(state_).views().source_rank; }
ConstTensorView Received::source_token() const { return handle_of(state_).views().source_token; }
ConstTensorView Received::source_k() const { return handle_of(state_).views().source_k; }
ConstTensorView Received::expert_counts() const { return handle_of(state_).views().expert_counts; }
ConstTensorView Received::expert_offsets() const { return handle_of(state_).views().expert_offsets; }
ConstTensorView Received::expert_rows() const { return handle_of(state_).views().expert_rows; }
ConstTensorView Received::rank_counts() const { return handle_of(state_).views().rank_counts; }
ConstTensorView Received::sent_counts() const { return handle_of(state_).views().sent_counts; }
ConstTensorView Received::ranges() const { return handle_of(state_).views().ranges; }
ConstTensorView Received::present() const { return handle_of(state_).views().present; }

template <class Result>
Result Pending<Result>::finish() {
  if (!state_ || !state_->finish) usage_error("finish() on an operation that was never started, or is finished already");
  return std::exchange(state_->finish, {})();
}

template <class Result>
bool Pending<Result>::ready() const {
  return state_ && state_->finish && state_->ready();
}

template class Pending<Received>;
template class Pending<Combined>;

Exchange::Exchange(const World& world, const ExchangeOptions& options)
    : engine_(options.device == Device::cuda ? make_cuda_engine(world, options) : make_cpu_engine(world, options)) {}
Exchange::~Exchange() = default;
Exchange::Exchange(Exchange&&) noexcept = default;
Exchange& Exchange::operator=(Exchange&&) noexcept = default;

int Exchange::add(const Placement& placement) { return engine_->add(placement); }

Received Exchange::dispatch(const DispatchInput& input, const DispatchOptions& options) {
  return engine_->dispatch(input, options, nullptr);
}

Received Exchange::dispatch(const DispatchInput& input, const Handle& handle, const DispatchOptions& options) {
  return engine_->dispatch(input, options, &handle);
}

Combined Exchange::combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) {
  return engine_->combine(y, handle, options);
}

Pending<Received> Exchange::start_dispatch(const DispatchInput& input, const DispatchOptions& options) {
  return engine_->start_dispatch(input, options, nullptr);
}

Pending<Received> Exchange::start_dispatch(const DispatchInput& input, const Handle& handle, const DispatchOptions& options) {
  return engine_->start_dispatch(input, options, &handle);
}

Pending<Combined> Exchange::start_combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) {
  return engine_->start_combine(y, handle, options);
}

DispatchGradient Exchange::dispatch_backward(const Handle& handle, const ConstTensorView& grad_rows,
                                             const ConstTensorView& grad_row_weights) {
  CombineOptions options;
  options.row_weights = grad_row_weights;
  options.stream = held(handle.state(), "Handle").stream;
  Combined combined = engine_->combine(grad_rows, handle, options);
  return {combined.out, combined.combined_weights, std::move(combined.memory)};
}

CombineGradient Exchange::combine_backward(const Handle& handle, const ConstTensorView& grad_out, const ConstTensorView& y,
                                           const CombineOptions& options) {
  return engine_->combine_backward(handle, grad_out, y, options);
}

TensorView Exchange::expert_rows(const Handle& handle, Dtype dtype, std::int64_t hidden_size, void* stream) {
  return engine_->expert_rows(handle, dtype, hidden_size, stream);
}

void Exchange::abandon(const std::string& reason) { engine_->abandon(reason); }
void Exchange::check() const { engine_->check(); }
ExchangeStatus Exchange::status() const { return engine_->status(); }
void Exchange::clear() { engine_->clear(); }
std::vector<int> Exchange::recover() { return engine_->recover(); }
const World& Exchange::world() const { return engine_->world(); }
const ExchangeOptions& Exchange::options() const { return engine_->options(); }
Transport Exchange::transport() const { return engine_->transport(); }
std::vector<std::int64_t> Exchange::link_bytes() const { return engine_->link_bytes(); }
PeerWaits Exchange::peer_waits() const { return engine_->peer_waits(); }
std::vector<PhaseSpan> Exchange::take_spans() { return engine_->take_spans(); }

}  // namespace tokenyard
