// The public face of the exchange.

#include "tokenyard/exchange.h"

#include "core/usage.h"
#include "exchange/engine.h"

namespace tokenyard {

using namespace exchange_internal;

namespace {

template <class T>
T& held(const std::shared_ptr<T>& state, const char* what) {
  if (!state) usage_error("the {} is empty (never filled, or moved from)", what);
  return *state;
}

// An absent tensor when the layout does not have it.
template <class T>
ConstTensorView view_of(const std::vector<T>& values, Dtype dtype, std::vector<std::int64_t> shape, bool present = true) {
  ConstTensorView view;
  if (!present) return view;
  view.data = values.data();
  view.dtype = dtype;
  view.ndim = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.shape[d] = shape[d];
    view.strides[d] = stride;
    stride *= shape[d];
  }
  return view;
}

const HandleState& handle_of(const std::shared_ptr<ReceivedState>& state) { return *held(state, "Received").handle.state(); }

std::vector<std::int64_t> with(std::vector<std::int64_t> shape, std::int64_t last) {
  shape.push_back(last);
  return shape;
}

}  // namespace

Layout Handle::layout() const { return held(state_, "Handle").layout; }
Mode Handle::mode() const { return held(state_, "Handle").mode; }
int Handle::placement() const { return held(state_, "Handle").placement; }
std::int64_t Handle::num_tokens() const { return held(state_, "Handle").sent.num_tokens; }
std::int64_t Handle::num_rows() const { return held(state_, "Handle").received.size(); }
std::span<const std::int64_t> Handle::dropped() const { return held(state_, "Handle").dropped; }

TensorView Received::rows() const { return held(state_, "Received").rows; }
TensorView Received::scales() const { return held(state_, "Received").scales; }
std::int64_t Received::num_rows() const { return handle_of(state_).metadata.num_rows; }
ConstTensorView Received::num_rows_device() const { return {}; }
const Handle& Received::handle() const { return held(state_, "Received").handle; }

void Received::release() {
  ReceivedState& state = held(state_, "Received");
  state.rows = {};
  state.scales = {};
  state.lease.reset();
}

ConstTensorView Received::local_ids() const {
  const HandleState& handle = handle_of(state_);
  return view_of(handle.metadata.local_ids, Dtype::int32, with(handle.metadata.rows_shape, handle.top_k()), !handle.is_expert_layout());
}

ConstTensorView Received::row_weights() const {
  const HandleState& handle = handle_of(state_);
  const Metadata& meta = handle.metadata;
  return view_of(meta.row_weights, Dtype::float32, handle.is_expert_layout() ? meta.rows_shape : with(meta.rows_shape, handle.top_k()));
}

ConstTensorView Received::source_rank() const {
  const HandleState& handle = handle_of(state_);
  return view_of(handle.metadata.source_rank, Dtype::int32, handle.metadata.rows_shape, handle.layout != Layout::rank_slots);
}

ConstTensorView Received::source_token() const {
  const HandleState& handle = handle_of(state_);
  return view_of(handle.metadata.source_token, Dtype::int32, handle.metadata.rows_shape, handle.layout != Layout::rank_slots);
}

ConstTensorView Received::source_k() const {
  const HandleState& handle = handle_of(state_);
  return view_of(handle.metadata.source_k, Dtype::int32, handle.metadata.rows_shape, handle.is_expert_layout());
}

ConstTensorView Received::expert_counts() const {
  const Metadata& meta = handle_of(state_).metadata;
  return view_of(meta.expert_counts, Dtype::int32, {static_cast<std::int64_t>(meta.expert_counts.size())});
}

ConstTensorView Received::expert_offsets() const {
  const Metadata& meta = handle_of(state_).metadata;
  return view_of(meta.expert_offsets, Dtype::int32, {static_cast<std::int64_t>(meta.expert_offsets.size())}, !meta.expert_offsets.empty());
}

ConstTensorView Received::expert_rows() const {
  const HandleState& handle = handle_of(state_);
  const Metadata& meta = handle.metadata;
  const bool has_map = handle.layout == Layout::token_major && !meta.expert_offsets.empty();
  return view_of(meta.expert_rows, Dtype::int32, {static_cast<std::int64_t>(meta.expert_rows.size())}, has_map);
}

ConstTensorView Received::rank_counts() const {
  const Metadata& meta = handle_of(state_).metadata;
  return view_of(meta.rank_counts, Dtype::int32, {static_cast<std::int64_t>(meta.rank_counts.size())});
}

ConstTensorView Received::sent_counts() const {
  const Metadata& meta = handle_of(state_).metadata;
  return view_of(meta.sent_counts, Dtype::int32, {static_cast<std::int64_t>(meta.sent_counts.size())});
}

ConstTensorView Received::ranges() const {
  const HandleState& handle = handle_of(state_);
  const Metadata& meta = handle.metadata;
  const auto ranks = static_cast<std::int64_t>(meta.rank_counts.size());
  const auto experts = static_cast<std::int64_t>(meta.expert_counts.size());
  return view_of(meta.ranges, Dtype::int32, {experts, ranks, 2}, handle.layout == Layout::expert_padded);
}

ConstTensorView Received::present() const {
  const HandleState& handle = handle_of(state_);
  return view_of(handle.metadata.present, Dtype::uint8, handle.metadata.rows_shape, handle.layout == Layout::rank_slots);
}

template <class Result>
Result Pending<Result>::finish() {
  if (!state_ || !state_->future.valid()) usage_error("finish() on an operation that was never started, or is finished already");
  return state_->future.get();
}

template <class Result>
bool Pending<Result>::ready() const {
  return state_ && state_->future.valid() && state_->future.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

template class Pending<Received>;
template class Pending<Combined>;

Exchange::Exchange(const World& world, const ExchangeOptions& options) : engine_(std::make_unique<Engine>(world, options)) {}
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
  Combined combined = engine_->combine(grad_rows, handle, options);
  return {combined.out, combined.combined_weights, std::move(combined.memory)};
}

CombineGradient Exchange::combine_backward(const Handle& handle, const ConstTensorView& grad_out, const ConstTensorView& y,
                                           const CombineOptions& options) {
  return engine_->combine_backward(handle, grad_out, y, options);
}

TensorView Exchange::expert_rows(const Handle& handle, Dtype dtype, std::int64_t hidden_size) {
  return engine_->expert_rows(handle, dtype, hidden_size);
}

void Exchange::check() const { engine_->check(); }
ExchangeStatus Exchange::status() const { return engine_->status(); }
void Exchange::clear() { engine_->clear(); }
std::vector<int> Exchange::recover() { return engine_->recover(); }
const World& Exchange::world() const { return engine_->world(); }
const ExchangeOptions& Exchange::options() const { return engine_->options(); }
Transport Exchange::transport() const { return engine_->transport().transport(); }
std::vector<std::int64_t> Exchange::link_bytes() const { return engine_->transport().link_bytes(); }
std::vector<PhaseSpan> Exchange::take_spans() { return engine_->take_spans(); }

}  // namespace tokenyard
