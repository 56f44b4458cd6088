// The combine of the CUDA engine: by pull where rows lie in memory that peers read, else by push into the owners' staging.

#include <algorithm>

#include "core/usage.h"
#include "exchange/cuda_engine.h"
#include "exchange/cuda_views.h"

namespace tokenyard::exchange_internal {
namespace {

const DeviceHandle& device_handle(const Handle& handle) { return static_cast<const DeviceHandle&>(*handle.state()); }

void check_summable(const char* what, const ConstTensorView& view) {
  if (view && view.dtype == Dtype::float64)
    usage_error("{} is {}; on GPUs combine adds float32, bfloat16 and float16", what, describe(view));
}

// Rows of `row_bytes`, `pitch` bytes apart.
struct Rows {
  const std::byte* first = nullptr;
  std::int64_t pitch = 0;
  std::int64_t count = 0;
  std::int64_t row_bytes = 0;

  const std::byte* end() const { return first + (count - 1) * pitch + row_bytes; }
  bool touch(const Rows& other) const { return first != nullptr && first < other.end() && other.first < end(); }
  bool are_aligned() const { return reinterpret_cast<std::uintptr_t>(first) % 16 == 0 && pitch % 16 == 0; }
};

// How many blocks beside those of a push fold this rank's own rows into out: as many multiprocessors as those leave free, unless they
// are few (measured with 68 of 132 alone), and where partial sums can lie in out until the sum, which reads nothing else from there.
int own_blocks_of(const cuda::CombineArgs& args, const DeviceHandle& handle, int multiprocessors) {
  const bool folds = args.fold && handle.is_expert_layout() && args.y != nullptr && args.out != nullptr;
  if (args.mode == Mode::latency || !folds || handle.tokens == 0) return 0;
  const auto rows = [&](const std::byte* first, std::int64_t pitch) { return Rows{first, pitch, handle.tokens, args.header.row_bytes}; };
  const Rows out = rows(args.out, args.out_pitch);
  const bool fits = args.out_dtype == args.dtype && out.are_aligned() && !rows(args.bias0, args.bias0_pitch).touch(out) &&
                    !rows(args.bias1, args.bias1_pitch).touch(out);
  const int left = multiprocessors - args.blocks;
  return args.context.ranks > 1 && fits && left >= cuda::kFewestOwnBlocks ? left : 0;
}

}  // namespace

cuda::CombineArgs CudaEngine::make_combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) const {
  check_handle(*this, handle);
  const DeviceHandle& state = device_handle(handle);
  check_combine(*this, y, state, options);
  check_summable("y", y);
  check_summable("out", options.out);
  check_memory("y", y);
  check_memory("out", options.out);
  check_memory("source_weights", options.source_weights);
  check_memory("row_weights", options.row_weights);
  check_memory("bias0", options.bias0);
  check_memory("bias1", options.bias1);
  check_memory("waits", options.waits);
  cuda::CombineArgs args;
  args.context = context(options.waits);
  args.handle = state.view;
  args.layout = state.layout;
  args.mode = state.mode;
  args.y = static_cast<const std::byte*>(y.data);
  args.y_pitch = pitch_of(y);
  args.dtype = y.dtype;
  args.elements = static_cast<std::int32_t>(y.shape[y.ndim - 1]);
  args.weighting = options.weighting;
  args.order = options.order;
  args.fold = options.fold;
  args.shard_ordinals = tables_[state.placement].shard_ordinals;
  if (groups_) args.groups = groups_.as<const std::int32_t>();
  if (options.source_weights) args.source_weights = matrix(options.source_weights);
  if (options.row_weights) args.row_weights = options.row_weights.as<float>();
  if (options.bias0) {
    args.bias0 = static_cast<const std::byte*>(options.bias0.data);
    args.bias0_pitch = pitch_of(options.bias0);
  }
  if (options.bias1) {
    args.bias1 = static_cast<const std::byte*>(options.bias1.data);
    args.bias1_pitch = pitch_of(options.bias1);
  }
  // Peers pull from expert rows whenever the exchange has them: all ranks decide alike. Weights that travel back are pushed.
  args.pull = options_.expert_rows && !state.is_expert_layout() && !state.shape.is_compacted() && !options.row_weights;
  protocol::CallHeader& header = args.header;
  header.placement_hash = state.placement_hash;
  header.handle_call = 1;  // the kernel puts the handle's own number there
  header.row_bytes = static_cast<std::uint32_t>(args.elements * size_of(y.dtype));
  header.operation = protocol::Operation::combine;
  header.layout = static_cast<std::uint8_t>(state.layout);
  header.mode = static_cast<std::uint8_t>(state.mode);
  header.top_k = static_cast<std::uint8_t>(state.top_k());
  header.dtype = static_cast<std::uint8_t>(y.dtype);
  header.weighting = static_cast<std::uint8_t>(options.weighting);
  header.unfolded = options.fold ? 0 : 1;
  header.row_weights = options.row_weights ? 1 : 0;
  return args;
}

// Rows that the caller computed elsewhere are brought to where peers pull them.
void CudaEngine::bring_to_expert_rows(cuda::CombineArgs& args, const DeviceHandle& handle, cudaStream_t stream) {
  std::byte* const to = arena_->expert_rows();
  const std::int64_t row_bytes = args.header.row_bytes;
  if (args.y != to || args.y_pitch != row_bytes) {
    wait_for_reads(args.context, stream);
    const std::int64_t rows = handle.total_rows();
    phase("combine copy", stream, [&] {
      const bool dense = args.y_pitch == row_bytes;  // copied at once, which is faster
      cuda_check(dense ? cudaMemcpyAsync(to, args.y, rows * row_bytes, cudaMemcpyDeviceToDevice, stream)
                       : cudaMemcpy2DAsync(to, row_bytes, args.y, args.y_pitch, row_bytes, rows, cudaMemcpyDeviceToDevice, stream),
                 "copying y to expert rows");
    });
  }
  args.y = to;
  args.y_pitch = row_bytes;
}

// Only the device knows whether there is anything to wait for: replayed graphs combine, too.
void CudaEngine::wait_for_reads(const cuda::Context& context, cudaStream_t stream) {
  cuda::launch_wait_reads(context, stream);
  cuda_check(cudaGetLastError(), "waiting for peers to have read expert rows");
}

void CudaEngine::push_and_sum(const cuda::CombineArgs& args, cudaStream_t stream) {
  if (args.mode == Mode::latency) {
    phase("combine fused", stream, [&] { cuda::launch_combine_fused(args, stream); });
    return;
  }
  phase("combine push", stream, [&] { cuda::launch_combine_push(args, stream); });
  phase("combine wait", stream, [&] { cuda::launch_wait_partials(args.context, stream); });
  cuda::CombineArgs sum = args;
  sum.blocks = multiprocessors_of(device_);
  phase("combine sum", stream, [&] { cuda::launch_combine_sum(sum, stream); });
}

Combined CudaEngine::enqueue_combine(cuda::CombineArgs args, const Handle& handle, const CombineOptions& options, cudaStream_t stream) {
  const DeviceHandle& state = device_handle(handle);
  const std::int64_t tokens = state.tokens;
  const bool has_rows = args.y != nullptr || args.elements != 0;
  const std::int64_t row_part = options.out || !has_rows ? 0 : protocol::align_up(tokens * args.header.row_bytes, 64);
  Combined result;
  auto memory = blocks_->take(row_part + tokens * state.top_k() * 4, stream);
  if (has_rows) {
    result.out = options.out ? options.out : TensorView(memory.get(), args.dtype, {tokens, args.elements});
    args.out = static_cast<std::byte*>(result.out.data);
    args.out_pitch = result.out.strides[0] * size_of(result.out.dtype);
    args.out_dtype = result.out.dtype;
  }
  if (args.row_weights != nullptr || args.header.row_weights != 0) {
    result.combined_weights = TensorView(memory.get() + row_part, Dtype::float32, {tokens, state.top_k()});
    args.combined_weights = result.combined_weights.as<float>();
  }
  result.memory = std::move(memory);
  args.blocks = budget_.multiprocessors;
  if (args.pull) {
    bring_to_expert_rows(args, state, stream);
    phase("combine pull", stream, [&] { cuda::launch_combine_pull(args, stream); });
  } else {
    if (args.weighting == Weighting::at_source) phase("combine weights", stream, [&] { cuda::launch_combine_weights(args, stream); });
    args.own_blocks = own_blocks_of(args, state, multiprocessors_of(device_));
    push_and_sum(args, stream);
  }
  cuda_check(cudaGetLastError(), "enqueueing a combine");
  return result;
}

Combined CudaEngine::combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) {
  const CudaDeviceScope scope(device_);
  const auto stream = static_cast<cudaStream_t>(options.stream);
  const cuda::CombineArgs args = admit(stream, [&] { return make_combine(y, handle, options); });
  order_.enter(stream);
  Combined combined = enqueue_combine(args, handle, options, stream);
  order_.leave(stream);
  return combined;
}

Pending<Combined> CudaEngine::start_combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) {
  const CudaDeviceScope scope(device_);
  const auto caller = static_cast<cudaStream_t>(options.stream);
  const cuda::CombineArgs args = admit(caller, [&] { return make_combine(y, handle, options); });
  order_streams(caller, stream_.get(), entered_);
  order_.enter(stream_.get());
  auto combined = std::make_shared<Combined>(enqueue_combine(args, handle, options, stream_.get()));
  order_.leave(stream_.get());
  auto done = std::make_shared<CudaEvent>(value_or_throw(make_cuda_event()));
  cuda_check(cudaEventRecord(done->get(), stream_.get()), "cudaEventRecord");
  auto pending = std::make_shared<PendingState<Combined>>();
  pending->ready = [done] { return cudaEventQuery(done->get()) == cudaSuccess; };
  pending->finish = [combined, done, caller, kept = handle] {
    cuda_check(cudaStreamWaitEvent(caller, done->get()), "cudaStreamWaitEvent");
    BlockPool::continue_on(combined->memory, caller);
    return std::move(*combined);
  };
  return Pending<Combined>(std::move(pending));
}

// The gradient of combine: rows of grad_out travel like the dispatch, then weights come back as in a combine.
CombineGradient CudaEngine::combine_backward(const Handle& handle, const ConstTensorView& grad_out, const ConstTensorView& y,
                                             const CombineOptions& options) {
  const CudaDeviceScope scope(device_);
  CombineGradient gradient;
  gradient.rows = dispatch({.rows = grad_out}, {.waits = options.waits, .stream = options.stream}, &handle);
  const bool weighs = options.weighting == Weighting::at_expert || options.weighting == Weighting::at_source;
  return weighs ? enqueue_weight_gradient(handle, std::move(gradient), y, options) : std::move(gradient);
}

CombineGradient CudaEngine::enqueue_weight_gradient(const Handle& handle, CombineGradient gradient, const ConstTensorView& y,
                                                    const CombineOptions& options) {
  const auto stream = static_cast<cudaStream_t>(options.stream);
  const DeviceHandle& state = device_handle(handle);
  CombineOptions only_weights = options;
  only_weights.out = {};
  cuda::CombineArgs args = admit(stream, [&] {
    const TensorView rows = gradient.rows.rows();
    if (y.dtype != rows.dtype) usage_error("y is {} but grad_out is {}; give both in one dtype", describe(y), name(rows.dtype));
    return make_combine(y, handle, only_weights);
  });
  const std::int64_t output_rows = state.total_rows();
  auto row_gradient = blocks_->take(output_rows * 4, stream);
  cuda::DifferentiateArgs differentiate{.handle = state.view, .shape = shape_, .weights = state.view.weights};
  if (options.weighting == Weighting::at_source) differentiate.weights = arena_->weights_in();
  const TensorView rows = gradient.rows.rows();
  differentiate.weights_pitch = options.weighting == Weighting::at_source ? shape_.top_k : state.top_k();
  differentiate.g = static_cast<std::byte*>(rows.data);
  differentiate.g_pitch = pitch_of(rows);
  differentiate.y = args.y;
  differentiate.y_pitch = args.y_pitch;
  differentiate.dtype = args.dtype;
  differentiate.elements = args.elements;
  differentiate.row_gradient = reinterpret_cast<float*>(row_gradient.get());
  differentiate.output_rows = output_rows;
  args.y = nullptr;
  args.elements = 0;
  args.pull = false;
  args.header.row_bytes = 0;
  args.header.row_weights = 1;
  args.row_weights = differentiate.row_gradient;
  order_.enter(stream);
  if (options.weighting == Weighting::at_source) {
    cuda::launch_combine_weights(args, stream);
    cuda::launch_wait_weights(args.context, stream);
  }
  cuda::launch_differentiate(differentiate, stream);
  args.source_weights = {};
  auto memory = blocks_->take(state.tokens * state.top_k() * 4, stream);
  gradient.topk_weights = TensorView(memory.get(), Dtype::float32, {state.tokens, state.top_k()});
  args.combined_weights = gradient.topk_weights.as<float>();
  args.blocks = budget_.multiprocessors;
  push_and_sum(args, stream);
  cuda_check(cudaGetLastError(), "enqueueing the gradient of weights");
  order_.leave(stream);
  gradient.memory = std::move(memory);
  return gradient;
}

TensorView CudaEngine::expert_rows(const Handle& handle, Dtype dtype, std::int64_t hidden_size, void* stream) {
  const CudaDeviceScope scope(device_);
  check_expert_rows(*this, handle, dtype, hidden_size);
  check();
  wait_for_reads(arena_->context(), static_cast<cudaStream_t>(stream));
  return [&]() -> TensorView {
    const std::vector<std::int64_t>& shape = handle.state()->rows_shape();
    std::byte* const memory = arena_->expert_rows();
    if (shape.size() == 2) return {memory, dtype, {shape[0], shape[1], hidden_size}};
    return {memory, dtype, {shape[0], hidden_size}};
  }();
}

}  // namespace tokenyard::exchange_internal
