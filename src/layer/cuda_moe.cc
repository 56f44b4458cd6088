#include "layer/cuda_moe.h"

#include <algorithm>
#include <span>

#include "experts/row_block.h"
#include "layer/cuda/kernels.h"
#include "layer/cuda_calls.h"
#include "layer/moe_checks.h"
#include "layer/steps.h"
#include "tokenyard/norm.h"

namespace tokenyard::layer_internal {
namespace {

using experts_internal::check_dense;
using experts_internal::check_rows;

// What the experts of a rank are, as ranks tell each other.
enum : std::uint8_t { kNone, kOther, kFloat8 };

}  // namespace

CudaMoe::CudaMoe(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options)
    : group_(std::move(group)),
      weights_(weights),
      gate_(weights.gate, options.gate),
      activation_(options.activation),
      num_local_experts_(local_experts_of(*group_, options, gate_)) {
  layer_internal::check_weights(*group_, weights, num_local_experts_);
  if (weights.shared.weights.w13) {
    layer_internal::check_dense(weights.shared);
    shared_.emplace(*group_, weights.shared, options.activation);
  }
  is_float8_ = agree_on_float8();
  check_weights();
  if (DeviceCollectives* const ranks = group_->tp_on_gpus(); ranks != nullptr) {
    Exchange* const exchange = group_->exchange();
    shards_.emplace(*ranks, exchange != nullptr ? exchange->options().receive_rows : group_->options().max_tokens_per_rank);
  }
  if (group_->exchange() != nullptr) placement_ = group_->add(placement_of(*group_, options, gate_.num_experts()));
  rehearse();
  group_->world().barrier();
}

Slice CudaMoe::slice_of(std::int64_t tokens) const {
  if (!is_sliced()) return {0, tokens};
  ShardCounts counts;
  counts.slice(shards_->size(), tokens);
  return counts.slice_of(shards_->rank());
}

bool CudaMoe::agree_on_float8() const {
  const std::byte mine{num_local_experts_ == 0 ? kNone : experts_internal::is_float8(weights_.experts) ? kFloat8 : kOther};
  const auto all = group_->world().all_gather(std::span(&mine, 1));
  const auto first_with = [&](std::uint8_t kind) {
    return std::find_if(all.begin(), all.end(), [&](const auto& of_rank) { return of_rank[0] == std::byte{kind}; });
  };
  const auto float8 = first_with(kFloat8), other = first_with(kOther);
  if (float8 != all.end() && other != all.end()) {
    usage_error("experts.w13 is float8_e4m3 on rank {} and not on rank {}; use one kind of weights in a layer", float8 - all.begin(),
                other - all.begin());
  }
  return float8 != all.end();
}

Dtype CudaMoe::dtype() const {
  if (!has_weights() || is_float8_) return group_->options().dtype;
  return num_local_experts_ > 0 ? weights_.experts.w13.dtype : weights_.shared.weights.w13.dtype;
}

void CudaMoe::check_weights() const {
  const ExpertGroupOptions& most = group_->options();
  if (gate_.num_experts() > most.num_experts || gate_.gate().top_k > most.top_k) {
    usage_error("{} experts and top_k = {}; the group was made for {} and {} at most", gate_.num_experts(), gate_.gate().top_k,
                most.num_experts, most.top_k);
  }
  check_dense("gate.weight", weights_.gate.weight, {gate_.num_experts(), gate_.hidden_size()});
  const ConstTensorView& shared = weights_.shared.weights.w13;
  if (is_float8_ && dtype() != Dtype::bfloat16 && dtype() != Dtype::float16) {
    usage_error(
        "experts.w13 is float8_e4m3 and the group's dtype {}; rows of such a layer are of the group's dtype, bfloat16 or float16: make "
        "the group with ExpertGroupOptions::dtype = bfloat16",
        name(dtype()));
  }
  if (shared && shared.dtype != dtype()) {
    usage_error("w13 of the shared expert is {}, and rows are {} as {} has it; on GPUs use one dtype", describe(shared), name(dtype()),
                is_float8_ ? "the group of float8_e4m3 experts" : "w13 of the experts");
  }
  check_dense_on_gpu({weights_.experts, {}}, workspace().device());
  check_memory("gate.weight", weights_.gate.weight);
  check_memory("gate.logit_bias", weights_.gate.logit_bias);
  check_memory("gate.selection_bias", weights_.gate.selection_bias);
}

void CudaMoe::check(const ConstTensorView& x, const ConstTensorView& out, const MoeStepOptions& options) const {
  const ExpertGroupOptions& most = group_->options();
  check_rows("x", x, x.ndim == 2 ? x.shape[0] : 0, gate_.hidden_size());
  if (options.sliced_out && !is_sliced()) usage_error("sliced_out without same_tokens; every rank has its own tokens: out is all of them");
  check_rows("out", out, options.sliced_out ? slice_of(x.shape[0]).count : x.shape[0], x.shape[1]);
  if (out.dtype != x.dtype) usage_error("x is {} and out {}; use one dtype", describe(x), describe(out));
  if (is_float8_ && x.dtype != dtype()) {
    usage_error("x is {} and this layer's experts are float8_e4m3; on GPUs rows of such are of the group's dtype, {}", describe(x),
                name(dtype()));
  }
  if (has_weights() && x.dtype != dtype()) {
    usage_error("x is {} and this layer's weights are {}; on GPUs rows and weights are of one dtype", describe(x), name(dtype()));
  }
  if (x.shape[0] > most.max_tokens_per_rank || size_of(x.dtype) > size_of(most.dtype)) {
    usage_error("x is {}; the group was made for at most {} tokens of {}", describe(x), most.max_tokens_per_rank, name(most.dtype));
  }
  if (options.logits) experts_internal::check_float32("logits", options.logits, {x.shape[0], gate_.num_experts()});
  check_memory("x", x);
  check_memory("out", out);
  check_memory("mask", options.mask);
  check_memory("given_ids", options.given_ids);
  check_memory("logits", options.logits);
}

void CudaMoe::forward(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options, MoeActivations* saved) {
  const CudaDeviceScope scope(workspace().device());
  guarded(options.stream, [&](int& owed) {
    if (shared_) shared_->begin_forward();
    if (shards_) shards_->begin(shard_calls_forward(options));
    check(x, out, options);
    MoeStep* const step = saved != nullptr ? &saved->step() : nullptr;
    CudaStep* const mine = step != nullptr ? &prepare(*step, x, options) : nullptr;
    forward_steps({x, options, mine}, out, step, owed);
  });
}

// Whoever leaves a step makes its calls all the same, as rejections: all ranks count alike, and the next step is fine.
void CudaMoe::leave(int owed, const std::string& reason, void* stream) {
  if (shared_) shared_->leave(reason, stream);
  if (shards_) shards_->leave(reason, stream);
  while (owed > 0) {
    try {
      group_->exchange()->abandon(reason);
      --owed;
    } catch (const TransportError& error) {  // of an earlier call, told once
      if (error.failure().kind != FailureKind::aborted) return;
    }
  }
}

// Numbers, rows, ids and weights, and the sums back; or the sums, and all of them again.
int CudaMoe::shard_calls_forward(const MoeStepOptions& options) const {
  if (is_gathered()) return 5;
  return options.sliced_out ? 1 : 2;
}

// Room for what a backward needs, in memory that the activations keep.
CudaStep& CudaMoe::prepare(MoeStep& saved, const ConstTensorView& x, const MoeStepOptions& options) {
  experts_internal::check_differentiable(weights_.experts);
  if (!group_->options().gradients) {
    usage_error("activations for backward, of a group on GPUs without gradients; make it with ExpertGroupOptions::gradients, or give none");
  }
  if (saved.on_gpu == nullptr) saved.on_gpu = std::make_shared<CudaStep>();
  CudaStep& step = *saved.on_gpu;
  StepMemory& memory = step.memory;
  const std::int64_t tokens = x.shape[0], hidden_size = x.shape[1], experts = gate_.num_experts(), top_k = gate_.gate().top_k;
  const std::int64_t places = group_->exchange() != nullptr || is_gathered() ? workspace().max_places() : tokens * top_k;
  const std::int64_t width = num_local_experts_ > 0 ? weights_.experts.w13.shape[2] : 0;
  memory.clear();
  memory.place(step.logits, Dtype::float32, {tokens, experts});
  memory.place(step.routing.topk_ids, Dtype::int32, {tokens, top_k});
  memory.place(step.routing.topk_weights, Dtype::float32, {tokens, top_k});
  memory.place(step.routing.load, Dtype::int64, {experts});
  memory.place(step.gate_up, x.dtype, {places, 2 * width});
  memory.place(step.y, x.dtype, {places, hidden_size});
  if (shared_) shared_->place(step.shared, memory, slice_of(tokens).count, x.dtype);
  if (is_gathered()) place(step.gathered, memory, x.dtype);
  memory.take(workspace().blocks(), stream_of(options.stream));
  step.num_tokens = tokens;
  saved.logits = step.logits;
  return step;
}

void CudaMoe::forward_steps(const Forward& of, const TensorView& out, MoeStep* saved, int& owed) {
  const cudaStream_t stream = stream_of(of.options.stream);
  Exchange* const exchange = group_->exchange();
  CallOrder& order = workspace().order();
  order.enter(stream);
  const DeviceRouting routing = run_gate(of);
  if (exchange == nullptr) {
    run_here(of, routing, out);
    order.leave(stream);
    return;
  }
  ConstTensorView shared;
  Received received = dispatch(of, routing, shared, owed);
  const Handle handle = received.handle();
  const TensorView y = is_gathered() ? run_shards(of, received) : run_experts(of, received);
  if (saved != nullptr) {
    saved->received = std::move(received);
  } else {
    received.release(stream);
  }
  const Phase phase(workspace().trace(), "combine", 0, stream);
  const Weighting weighting = is_gathered() ? Weighting::none : Weighting::at_expert;  // folded already
  made(owed, [&] { return exchange->combine(y, handle, {.weighting = weighting, .bias0 = shared, .out = out, .stream = stream}); });
  order.leave(stream);
}

DeviceRouting CudaMoe::run_gate(const Forward& of) {
  const cudaStream_t stream = stream_of(of.options.stream);
  const std::int64_t tokens = of.x.shape[0], num_experts = gate_.num_experts();
  const GateWeights& weights = weights_.gate;
  const TensorView wanted = of.options.logits;
  const TensorView logits = of.step != nullptr ? of.step->logits : wanted ? wanted : workspace().logits(tokens, num_experts);
  {
    const Phase phase(workspace().trace(), "gate", 0, stream);
    layer_cuda::gate_product({.num_tokens = tokens,
                              .num_experts = static_cast<int>(num_experts),
                              .hidden_size = static_cast<int>(of.x.shape[1]),
                              .x_dtype = of.x.dtype,
                              .w_dtype = weights.weight.dtype,
                              .bias_dtype = weights.logit_bias.dtype,
                              .x = data_of(of.x),
                              .x_stride = stride_of(of.x),
                              .w = data_of(weights.weight),
                              .bias = data_of(weights.logit_bias),
                              .logits = logits.as<float>(),
                              .parts = workspace().gate_parts()},
                             workspace().multiprocessors(), stream);
    check_launch("launch of the gate's product");
    if (wanted && wanted.data != logits.data) {
      cuda_check(cudaMemcpyAsync(wanted.data, logits.data, static_cast<std::size_t>(logits.num_elements()) * sizeof(float),
                                 cudaMemcpyDeviceToDevice, stream),
                 "copying logits");
    }
  }
  const Phase phase(workspace().trace(), "route", 0, stream);
  const DeviceRouting routing = of.step != nullptr ? of.step->routing : workspace().routing(tokens, num_experts, gate_.gate().top_k);
  route({.logits = logits, .bias = weights.selection_bias, .mask = of.options.mask, .given_ids = of.options.given_ids}, gate_.gate(),
        routing, stream);
  return routing;
}

Received CudaMoe::dispatch(const Forward& of, const DeviceRouting& routing, ConstTensorView& shared, int& owed) {
  const DispatchInput input = {.rows = of.x, .topk_ids = routing.topk_ids, .topk_weights = routing.topk_weights};
  const DispatchOptions how = {.placement = placement_,
                               .layout = is_gathered() ? Layout::token_major : Layout::expert_major,
                               .sizing = Sizing::capacity,
                               .mode = of.options.mode,
                               .copy_out = of.step != nullptr,
                               .quantise = is_float8_ && !is_gathered() ? std::optional(ScaleFormat::float32) : std::nullopt,
                               .stream = of.options.stream};
  const Phase phase(workspace().trace(), "dispatch", 0, stream_of(of.options.stream));
  if (has_shared() && shared_->is_cut()) shared = run_shared(of);  // not beside kernels that wait for other ranks
  if (!has_shared() || shared) return made(owed, [&] { return group_->exchange()->dispatch(input, how); });
  Pending<Received> rows = made(owed, [&] { return group_->exchange()->start_dispatch(input, how); });
  shared = run_shared(of);  // while rows travel
  return rows.finish();
}

ConstTensorView CudaMoe::run_shared(const Forward& of) {
  const Phase phase(workspace().trace(), "shared", 0, stream_of(of.options.stream));
  const Slice slice = slice_of(of.x.shape[0]);
  const TensorView out = workspace().shared(of.x.dtype, slice.count, of.x.shape[1]);
  shared_->forward(rows_of(of.x, slice.begin, slice.count), out, of.step != nullptr ? &of.step->shared : nullptr, of.options.stream);
  return out;
}

TensorView CudaMoe::run_experts(const Forward& of, const Received& received) {
  const Phase phase(workspace().trace(), "experts", 0, stream_of(of.options.stream));
  DeviceRowGroups groups = DeviceRowGroups::of(received);
  groups.likely *= group_->exchange()->options().max_fanout;  // shards have rows of all tokens of their expert
  const bool is_saved = of.step != nullptr;
  const TensorView y = is_saved ? of.step->y : workspace().places(of.x.dtype, groups.places, of.x.shape[1]);
  if (num_local_experts_ > 0) {
    workspace().experts().experts_forward(
        {.x = received.rows(), .gate_up = is_saved ? of.step->gate_up : TensorView(), .x_scales = received.scales()}, groups,
        weights_.experts, activation_, y, of.options.stream);
  }
  return y;
}

// Without an exchange: every expert is here, or a shard of it.
void CudaMoe::run_here(const Forward& of, const DeviceRouting& routing, const TensorView& out) {
  const ConstTensorView& x = of.x;
  const cudaStream_t stream = stream_of(of.options.stream);
  const ConstTensorView shared = has_shared() ? run_shared(of) : ConstTensorView();
  if (x.shape[0] == 0 && !is_gathered()) return;
  const bool completes = is_sliced() && !of.options.sliced_out;
  const Slice slice = slice_of(x.shape[0]);
  const TensorView mine = completes ? rows_of(out, slice.begin, slice.count) : out;
  const TensorView sums = shared ? workspace().sums(x.dtype, mine.shape[0], x.shape[1]) : mine;
  const ExpertRows input = {x, routing.topk_ids, routing.topk_weights};
  if (is_gathered())
    fold_gathered(of, input, workspace().number(x.shape[0]), sums);
  else if (is_sliced())
    fold_slice(of, input, sums);
  else
    fold_experts(of, input, sums);
  if (shared) {
    layer_cuda::add_rows(rows_args(sums, shared, mine), stream);
    check_launch("launch of a sum of rows");
  }
  if (completes) shards_->gather(mine, slice_counts(x.shape[0], shards_->size()), out, stream);
}

void CudaMoe::fold_experts(const Forward& of, const ExpertRows& input, const TensorView& sums) {
  const cudaStream_t stream = stream_of(of.options.stream);
  const Phase phase(workspace().trace(), "experts", 0, stream);
  if (num_local_experts_ == 0) return fill(sums, 0, stream);
  DeviceExperts& experts = workspace().experts();
  const DeviceRowGroups groups = experts.gather(input.local_ids, num_local_experts_, stream);
  const bool is_saved = of.step != nullptr;
  const TensorView y = is_saved ? of.step->y : workspace().places(sums.dtype, groups.places, sums.shape[1]);
  experts.experts_forward({.x = input.rows, .gate_up = is_saved ? of.step->gate_up : TensorView()}, groups, weights_.experts, activation_,
                          y, stream);
  experts.unpermute({y, input.local_ids, input.row_weights}, groups, sums, stream);
}

void CudaMoe::rehearse() {
  const CudaDeviceScope scope(workspace().device());
  const auto stream = value_or_throw(borrow_cuda_stream());
  const std::int64_t hidden_size = gate_.hidden_size(), most = group_->options().max_tokens_per_rank;
  workspace().order().enter(stream.get());
  workspace().set_quiet(true);
  DeviceExperts& experts = workspace().experts();
  for (const std::int64_t tokens : {std::int64_t{1}, most}) {  // a product in parts, and one in a piece
    const TensorView x = workspace().shared(dtype(), tokens, hidden_size);
    const MoeStepOptions options = {.stream = stream.get()};
    const DeviceRouting routing = run_gate({x, options});
    if (group_->exchange() == nullptr && !is_gathered())
      fold_experts({x, options}, {x, routing.topk_ids, routing.topk_weights}, workspace().sums(dtype(), tokens, hidden_size));
  }
  if (is_gathered()) rehearse_shards(stream.get());
  if (has_shared()) shared_->rehearse(stream.get());
  if (group_->exchange() != nullptr && !is_gathered() && num_local_experts_ > 0) {
    const std::int64_t places = workspace().max_places();
    const TensorView y = workspace().places(dtype(), places, hidden_size);
    const auto received = is_float8_ ? DeviceExperts::Forward{.x = workspace().places(Dtype::float8_e4m3, places, hidden_size),
                                                              .x_scales = workspace().places(
                                                                  Dtype::float32, places, scale_columns(hidden_size, ScaleFormat::float32))}
                                     : DeviceExperts::Forward{.x = y};  // the memory is not read: there are no rows
    experts.experts_forward(received, workspace().no_rows(places, num_local_experts_), weights_.experts, activation_, y, stream.get());
  }
  if (group_->options().gradients && !is_float8_) rehearse_backward(stream.get());
  workspace().set_quiet(false);
  workspace().order().leave(stream.get());
  cuda_check(cudaStreamSynchronize(stream.get()), "rehearsing a layer");
}

void CudaMoe::warm_up(std::span<const std::int64_t> token_counts) {
  const std::int64_t hidden_size = gate_.hidden_size(), top_k = gate_.gate().top_k, most = group_->options().max_tokens_per_rank;
  for (const std::int64_t tokens : token_counts) {
    if (tokens < 0 || tokens > most) usage_error("warm_up: {} tokens; expected 0 to {}, the group's max_tokens_per_rank", tokens, most);
  }
  const CudaDeviceScope scope(workspace().device());
  const auto stream = value_or_throw(borrow_cuda_stream());
  const Dtype rows = dtype();
  const auto make = [&](std::int64_t bytes) {
    return value_or_throw(make_device_buffer(workspace().device(), static_cast<std::size_t>(bytes)));
  };
  const DeviceBuffer x = make(most * hidden_size * size_of(rows)), ids = make(most * top_k * size_of(Dtype::int64));
  std::vector<std::int64_t> balanced(static_cast<std::size_t>(most * top_k));
  const std::int64_t first = group_->options().same_tokens ? 0 : group_->world().rank() * most * top_k;
  for (std::int64_t i = 0; i < std::ssize(balanced); ++i) balanced[i] = (first + i) % gate_.num_experts();
  cuda_check(cudaMemcpy(ids.data(), balanced.data(), balanced.size() * sizeof(std::int64_t), cudaMemcpyHostToDevice),
             "preparing a warm-up");
  cuda_check(cudaMemset(x.data(), 0, x.bytes()), "preparing a warm-up");
  cuda_check(cudaDeviceSynchronize(), "preparing a warm-up");
  group_->world().barrier();  // nobody allocates any more
  Exchange* const exchange = group_->exchange();
  for (const std::int64_t tokens : token_counts) {
    MoeStepOptions options = {.given_ids = {ids.data(), Dtype::int64, {tokens, top_k}}, .stream = stream.get()};
    const TensorView view(x.data(), rows, {tokens, hidden_size});
    forward(view, view, options, nullptr);
    const std::int64_t slots = exchange == nullptr ? 0 : exchange->world().size() * exchange->options().max_tokens_per_rank;
    if (slots == 0 || exchange->options().receive_rows < slots) continue;
    options.mode = Mode::latency;
    forward(view, view, options, nullptr);
  }
  cuda_check(cudaStreamSynchronize(stream.get()), "a warm-up");
  group_->check();
  group_->world().barrier();  // before memory goes back, which may wait for kernels
}

std::unique_ptr<MoeEngine> make_cuda_moe(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options) {
  return std::make_unique<CudaMoe>(std::move(group), weights, options);
}

}  // namespace tokenyard::layer_internal
