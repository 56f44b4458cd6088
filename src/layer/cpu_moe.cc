#include "layer/cpu_moe.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "core/usage.h"
#include "experts/row_block.h"
#include "layer/moe_checks.h"

namespace tokenyard::layer_internal {
namespace {

using experts_internal::from_float;
using experts_internal::to_float;

std::int64_t now_ns() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Notes one phase from construction to destruction.
class PhaseTimer {
 public:
  PhaseTimer(ExpertGroup& group, const char* phase) : group_(group), phase_(phase), begin_ns_(now_ns()) {}
  PhaseTimer(const PhaseTimer&) = delete;
  PhaseTimer& operator=(const PhaseTimer&) = delete;
  ~PhaseTimer() { group_.note({.phase = phase_, .begin_ns = begin_ns_, .end_ns = now_ns()}); }

 private:
  ExpertGroup& group_;
  const char* phase_;
  std::int64_t begin_ns_;
};

// out = a + b + c in float32, each optional and of its own type, rounded once. out may be one of them.
void add_rows(std::initializer_list<ConstTensorView> terms, const TensorView& out) {
  const std::int64_t columns = out.shape[1];
  std::vector<float> sum(static_cast<std::size_t>(columns)), term(sum.size());
  for (std::int64_t row = 0; row < out.shape[0]; ++row) {
    std::fill(sum.begin(), sum.end(), 0.0F);
    for (const ConstTensorView& of : terms) {
      if (!of) continue;
      to_float(of.row(row), of.dtype, columns, term.data());
      std::transform(sum.begin(), sum.end(), term.begin(), sum.begin(), std::plus<>());
    }
    from_float(sum.data(), out.dtype, columns, out.row(row));
  }
}

// Rows as combine takes them: in the shape of the dispatch.
template <class Pointer>
BasicTensorView<Pointer> in_layout(const Received& received, const BasicTensorView<Pointer>& matrix) {
  if (received.handle().layout() != Layout::rank_slots) return matrix;
  const ConstTensorView ids = received.local_ids();
  return {matrix.data, matrix.dtype, {ids.shape[0], ids.shape[1], matrix.shape[1]}};
}

// The rows of a dispatch as a matrix: all slots, or as many as arrived.
template <class Pointer>
BasicTensorView<Pointer> arrived(const Received& received, const BasicTensorView<Pointer>& rows) {
  const BasicTensorView<Pointer> matrix = as_matrix(rows);
  return received.handle().layout() == Layout::rank_slots ? matrix : rows_of(matrix, 0, received.num_rows());
}

}  // namespace

CpuMoe::CpuMoe(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options)
    : group_(std::move(group)),
      gate_(weights.gate, options.gate),
      experts_(weights.experts, options.activation, local_experts_of(*group_, options, gate_)) {
  check_weights(*group_, weights, local_experts_of(*group_, options, gate_));
  if (weights.shared.weights.w13) shared_.emplace(group_, weights.shared, options.activation);
  if (group_->exchange() != nullptr) placement_ = group_->add(placement_of(*group_, options, gate_.num_experts()));
}

Slice CpuMoe::slice_of(std::int64_t tokens) const {
  if (!is_sliced()) return {0, tokens};
  ShardCounts counts;
  counts.slice(group_->config().mlp_tp, tokens);
  return counts.slice_of(group_->tp_rank());
}

void CpuMoe::check(const ConstTensorView& x, const ConstTensorView& out, const MoeStepOptions& options) const {
  experts_internal::check_rows("x", x, x.ndim == 2 ? x.shape[0] : 0, gate_.hidden_size());
  if (options.sliced_out && !is_sliced()) usage_error("sliced_out without same_tokens; every rank has its own tokens: out is all of them");
  experts_internal::check_rows("out", out, options.sliced_out ? slice_of(x.shape[0]).count : x.shape[0], x.shape[1]);
  if (out.dtype != x.dtype) usage_error("x is {} and out {}; use one dtype", describe(x), describe(out));
}

CpuMoe::Awaited CpuMoe::awaited() const {
  return {
      .exchange = group_->exchange() != nullptr, .dense = shared_.has_value() && group_->dense() != nullptr, .tp = group_->tp() != nullptr};
}

template <class Step>
void CpuMoe::guarded(Step&& step) {
  Awaited left = awaited();
  try {
    step(left);
  } catch (const UsageError& error) {
    leave(left, {.kind = FailureKind::aborted, .peer = group_->world().rank(), .detail = error.what()});
    throw;
  } catch (const TransportError& error) {
    leave(left, error.failure());
    throw;
  }
}

void CpuMoe::leave(const Awaited& awaited, Failure why) {
  // After these, ranks can make the next call together.
  const bool is_passing = why.kind == FailureKind::aborted || why.kind == FailureKind::mismatch || why.kind == FailureKind::overflow;
  if (is_passing) why.kind = FailureKind::aborted;
  // Nobody is left to be told where these fail: the first failure is the one to report.
  const auto quietly = [](auto&& tell) {
    try {
      tell();
      return true;
    } catch (const TransportError&) {
      return false;
    }
  };
  bool is_in_exchange = awaited.exchange;
  // Rows on their way are read from what the caller is about to take away.
  if (rows_) is_in_exchange = quietly([this] { std::exchange(rows_, {}).finish(); });
  unsaved_.step().received = {};  // leases go back
  d_received_ = {};
  if (is_in_exchange && is_passing) quietly([&] { group_->exchange()->abandon(why.detail); });
  if (awaited.dense) quietly([&] { group_->dense()->abandon(why); });
  if (awaited.tp) quietly([&] { group_->tp()->abandon(why); });
}

void CpuMoe::forward(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, MoeActivations* saved) {
  guarded([&](Awaited& left) { forward_steps(x, out, options, saved, left); });
}

void CpuMoe::forward_steps(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, MoeActivations* saved,
                           Awaited& left) {
  check(x, out, options);
  const bool is_saved = saved != nullptr;
  if (is_saved) experts_.check_differentiable();
  MoeStep& step = is_saved ? saved->step() : unsaved_.step();
  {
    const PhaseTimer timer(*group_, "route");
    gate_.forward(x, options, step.gate);
  }
  ConstTensorView shared;
  {
    const PhaseTimer timer(*group_, "dispatch");
    left.exchange = false;  // it tells its ranks by itself
    rows_ = start_dispatch(x, options, step, is_saved);
    left.dense = false;
    if (shared_) shared = run_shared(x, step, is_saved);  // while rows travel
    if (rows_) step.received = std::exchange(rows_, {}).finish();
    left.exchange = group_->exchange() != nullptr;
    take_rows(x, step);
    left.tp = false;
    gather_shards(step);
  }
  const TensorView partial = partial_.view(x.dtype, step.input.rows.shape[0], x.shape[1]);
  {
    const PhaseTimer timer(*group_, "experts");
    experts_.forward(step.input, partial, step.experts, is_saved);
  }
  if (!is_saved && group_->exchange() != nullptr) step.received.release();
  const PhaseTimer timer(*group_, "combine");
  const ConstTensorView mine = reduce_shards(partial, step);
  left.exchange = false;
  sum(mine, shared, out, options, step);
}

ConstTensorView CpuMoe::run_shared(const ConstTensorView& x, MoeStep& step, bool is_saved) {
  const PhaseTimer timer(*group_, "shared");
  const Slice slice = slice_of(x.shape[0]);
  const TensorView out = shared_out_.view(x.dtype, slice.count, x.shape[1]);
  shared_->forward(rows_of(x, slice.begin, slice.count), out, is_saved ? &step.shared : nullptr);
  return out;
}

Pending<Received> CpuMoe::start_dispatch(const ConstTensorView& x, const MoeStepOptions& options, const MoeStep& step, bool is_saved) {
  if (group_->exchange() == nullptr) return {};
  const bool is_latency = options.mode == Mode::latency;
  // Slots would be gathered with their gaps, so shards get them compacted.
  const bool in_slots = is_latency && group_->tp() == nullptr;
  return group_->exchange()->start_dispatch(
      {.rows = x, .topk_ids = step.gate.routing.ids_view(), .topk_weights = step.gate.routing.weights_view()},
      {.placement = placement_,
       .layout = in_slots ? Layout::rank_slots : Layout::token_major,
       .sizing = is_latency ? Sizing::capacity : Sizing::exact,
       .mode = options.mode,
       .copy_out = is_saved});
}

void CpuMoe::take_rows(const ConstTensorView& x, MoeStep& step) {
  const Routing& routing = step.gate.routing;
  if (group_->exchange() != nullptr) {
    const Received& received = step.received;
    step.mine = {arrived<const void*>(received, received.rows()), arrived(received, received.local_ids()),
                 arrived(received, received.row_weights())};
    return;
  }
  step.local_ids.assign(routing.topk_ids.begin(), routing.topk_ids.end());
  step.mine = {x, {step.local_ids.data(), Dtype::int32, {x.shape[0], routing.top_k}}, routing.weights_view()};
}

void CpuMoe::gather_shards(MoeStep& step) {
  step.input = step.mine;
  Collectives* const shards = group_->tp();
  if (shards == nullptr) return;
  if (is_sliced()) return step.counts.slice(group_->config().mlp_tp, step.mine.rows.shape[0]);
  step.counts.gather(*shards, step.mine.rows.shape[0]);
  step.input = {gather_rows(*shards, step.counts, step.mine.rows, step.rows),
                gather_rows(*shards, step.counts, step.mine.local_ids, step.row_ids),
                gather_rows(*shards, step.counts, step.mine.row_weights, step.row_weights)};
}

// From this shard's partial sums to those of the window, of the rows that this rank had before they were gathered.
ConstTensorView CpuMoe::reduce_shards(const ConstTensorView& partial, const MoeStep& step) {
  Collectives* const shards = group_->tp();
  if (shards == nullptr) return partial;
  const TensorView reduced = reduced_.view(partial.dtype, step.counts.of(group_->tp_rank()), partial.shape[1]);
  shards->reduce_scatter_v(partial, step.counts.counts(), reduced);
  return reduced;
}

void CpuMoe::sum(const ConstTensorView& mine, const ConstTensorView& shared, const TensorView& out, const MoeStepOptions& options,
                 MoeStep& step) {
  if (group_->exchange() != nullptr) {
    group_->exchange()->combine(in_layout(step.received, mine), step.received.handle(), {.bias0 = shared, .out = out});
    return;
  }
  const bool gathers = is_sliced() && !options.sliced_out;
  const Slice slice = slice_of(step.gate.num_tokens);
  const TensorView to = gathers ? rows_of(out, slice.begin, slice.count) : out;
  add_rows({shared, mine}, to);
  if (gathers) group_->tp()->all_gather_v(to, step.counts.counts(), out);
}

void CpuMoe::check_gradients(const MoeGradients& gradients) const {
  using experts_internal::check_float32;
  const std::int64_t num_experts = gate_.num_experts();
  if (gradients.gate_weight) check_float32("gradients.gate_weight", gradients.gate_weight, {num_experts, gate_.hidden_size()});
  if (gradients.gate_bias) check_float32("gradients.gate_bias", gradients.gate_bias, {num_experts});
  experts_.check_gradients(gradients.experts);
  if (shared_) shared_->check_gradients(gradients.shared);
}

void CpuMoe::backward(const MoeBackwardInput& input, const MoeActivations& saved, const TensorView& d_x, const MoeGradients& gradients) {
  guarded([&](Awaited& left) { backward_steps(input, saved.step(), d_x, gradients, left); });
}

void CpuMoe::backward_steps(const MoeBackwardInput& input, MoeStep& step, const TensorView& d_x, const MoeGradients& gradients,
                            Awaited& left) {
  experts_.check_differentiable();
  check(input.x, input.d_out, input.options);
  const std::int64_t hidden_size = input.x.shape[1];
  experts_internal::check_rows("d_x", d_x, input.x.shape[0], hidden_size);
  if (input.d_logits) experts_internal::check_rows("d_logits", input.d_logits, input.x.shape[0], gate_.num_experts());
  if (step.gate.num_tokens != input.x.shape[0] || step.gate.routing.top_k == 0) {
    usage_error("saved is of {} tokens and x is {}; pass what forward saved for these rows", step.gate.num_tokens, describe(input.x));
  }
  check_gradients(gradients);
  const Slice slice = slice_of(input.x.shape[0]);
  const ConstTensorView x = rows_of(input.x, slice.begin, slice.count);
  left.dense = false;
  TensorView d_shared;
  if (shared_) {
    d_shared = d_shared_.view(input.x.dtype, slice.count, hidden_size);
    const bool cuts = is_sliced() && !input.options.sliced_out;
    shared_->backward(x, cuts ? rows_of(input.d_out, slice.begin, slice.count) : input.d_out, step.shared, d_shared, gradients.shared);
  }
  if (group_->exchange() == nullptr) step.mine.rows = input.x;
  if (group_->tp() == nullptr || is_sliced()) step.input = step.mine;
  const std::int64_t rows = step.input.rows.shape[0];
  const ExpertRowsGradient d = {d_rows_.view(input.x.dtype, rows, hidden_size),
                                d_row_weights_.view(Dtype::float32, rows, step.gate.routing.top_k)};
  left.exchange = false;
  const ConstTensorView d_received = received_gradient(input, step);
  left.exchange = group_->exchange() != nullptr;
  left.tp = false;
  experts_.backward(step.input, partial_gradient(d_received, input, step), step.experts, d, gradients.experts);
  const ExpertRowsGradient reduced = reduce_gradient(d, step);
  left.exchange = false;
  const ExpertRowsGradient mine = return_gradient(reduced, step);
  const ConstTensorView d_gate = gate_.backward({.x = x,
                                                 .d_topk_weights = mine.row_weights,
                                                 .d_logits = rows_of(input.d_logits, slice.begin, slice.count),
                                                 .first_token = slice.begin},
                                                input.options, step.gate, gradients);
  const TensorView d_slice = rows_of(d_x, slice.begin, slice.count);
  add_rows({mine.rows, d_gate, d_shared}, d_slice);
  gradient_memory_.reset();
  if (is_sliced()) group_->tp()->all_gather_v(d_slice, step.counts.counts(), d_x);
}

// Of the sums that this rank returned: d_out where there is no exchange.
ConstTensorView CpuMoe::received_gradient(const MoeBackwardInput& input, const MoeStep& step) {
  if (group_->exchange() == nullptr) return input.d_out;
  d_received_ = group_->exchange()->combine_backward(step.received.handle(), input.d_out).rows;
  return arrived<const void*>(step.received, d_received_.rows());
}

// Of what the experts' partial sums became: [N,H], of every row they had.
ConstTensorView CpuMoe::partial_gradient(const ConstTensorView& mine, const MoeBackwardInput& input, const MoeStep& step) {
  const bool is_complete = is_sliced() && !input.options.sliced_out;
  if (group_->tp() == nullptr || is_complete) return mine;
  return gather_rows(*group_->tp(), step.counts, mine, d_partial_);
}

// From what this shard computed with, to the rows that this rank had before they were gathered.
ExpertRowsGradient CpuMoe::reduce_gradient(const ExpertRowsGradient& d, const MoeStep& step) {
  if (group_->exchange() != nullptr) d_received_.release();
  Collectives* const shards = group_->tp();
  if (shards == nullptr) return d;
  const std::int64_t rows = step.counts.of(group_->tp_rank());
  const ExpertRowsGradient mine = {d_mine_.view(d.rows.dtype, rows, d.rows.shape[1]),
                                   d_mine_weights_.view(Dtype::float32, rows, d.row_weights.shape[1])};
  shards->reduce_scatter_v(d.rows, step.counts.counts(), mine.rows);
  shards->reduce_scatter_v(d.row_weights, step.counts.counts(), mine.row_weights);
  return mine;
}

// And to this rank's tokens.
ExpertRowsGradient CpuMoe::return_gradient(const ExpertRowsGradient& mine, const MoeStep& step) {
  if (group_->exchange() == nullptr) return mine;
  const DispatchGradient gradient = group_->exchange()->dispatch_backward(
      step.received.handle(), in_layout<const void*>(step.received, mine.rows), in_layout<const void*>(step.received, mine.row_weights));
  gradient_memory_ = gradient.memory;
  return {gradient.rows, gradient.topk_weights};
}

void CpuMoe::warm_up(std::span<const std::int64_t> token_counts) {
  const std::int64_t hidden_size = gate_.hidden_size();
  const Dtype dtype = group_->options().dtype;
  const std::int64_t num_experts = gate_.num_experts();
  const int top_k = gate_.gate().top_k;
  std::vector<std::int64_t> ids;
  Buffer rows;
  for (const std::int64_t tokens : token_counts) {
    if (tokens < 0 || tokens > group_->options().max_tokens_per_rank) {
      usage_error("warm_up: {} tokens; expected 0 to {}, the group's max_tokens_per_rank", tokens, group_->options().max_tokens_per_rank);
    }
    ids.resize(static_cast<std::size_t>(tokens * top_k));
    const std::int64_t first = group_->options().same_tokens ? 0 : group_->world().rank() * tokens * top_k;
    for (std::int64_t i = 0; i < std::ssize(ids); ++i) ids[i] = (first + i) % num_experts;
    const TensorView x = rows.view(dtype, tokens, hidden_size);
    std::vector<float> values(static_cast<std::size_t>(tokens * hidden_size));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 17) / 16.0F - 0.5F;
    from_float(values.data(), dtype, std::ssize(values), static_cast<std::byte*>(x.data));
    MoeStepOptions options = {.given_ids = {ids.data(), Dtype::int64, {tokens, top_k}}};
    forward(x, x, options, nullptr);
    Exchange* const exchange = group_->exchange();
    const std::int64_t slots = exchange == nullptr ? 0 : exchange->world().size() * exchange->options().max_tokens_per_rank;
    if (slots == 0 || exchange->options().receive_rows < slots) continue;
    options.mode = Mode::latency;
    forward(x, x, options, nullptr);
  }
}

std::unique_ptr<MoeEngine> make_cpu_moe(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options) {
  return std::make_unique<CpuMoe>(std::move(group), weights, options);
}

}  // namespace tokenyard::layer_internal
