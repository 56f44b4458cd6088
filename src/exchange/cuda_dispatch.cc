// The dispatch of the CUDA engine: move, layout, spread; or in latency mode slots, and then layout and spread unless it pads.

#include <algorithm>
#include <chrono>
#include <thread>

#include "core/usage.h"
#include "exchange/cuda_engine.h"
#include "exchange/cuda_views.h"

namespace tokenyard::exchange_internal {
namespace {

TensorView shaped(std::byte* data, Dtype dtype, const std::vector<std::int64_t>& shape, std::int64_t columns) {
  return shape.size() == 2 ? TensorView(data, dtype, {shape[0], shape[1], columns}) : TensorView(data, dtype, {shape[0], columns});
}

}  // namespace

LayoutOptions CudaEngine::layout_options(const DispatchOptions& options, int placement) const {
  return {.sizing = options.sizing,
          .gather_map = options.gather_map,
          .alignment = options.alignment,
          .expert_capacity = options.expert_capacity,
          .drop = options.drop,
          .local_experts = static_cast<int>(placements_[placement].placement.local_experts(world_.rank()).size()),
          .max_expert_rows = options_.max_expert_rows};
}

CudaDispatch CudaEngine::make_dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached, Halves halves) {
  if (placements_.empty()) usage_error("dispatch without a placement; register one with Exchange::add");
  CudaDispatch job;
  job.input = input;
  job.options = options;
  if (cached != nullptr) {
    check_handle(*this, *cached);
    job.cached = true;
    // The engine made it, and kernels of a cached dispatch only read it.
    job.handle = std::const_pointer_cast<DeviceHandle>(std::static_pointer_cast<const DeviceHandle>(cached->state()));
  }
  check_dispatch(*this, input, options, job.handle.get());
  check_dispatch_memory(job);
  const auto stream = static_cast<cudaStream_t>(options.stream);
  if (!job.cached && options.sizing == Sizing::exact && is_capturing(stream))
    usage_error("sizing = exact while a graph is captured; counts reach the host only when kernels run: use sizing = capacity");
  const int placement = placement_of(options, job.handle.get());
  job.source.emplace(input, options.quantise);
  job.layout_options = layout_options(options, placement);
  protocol::CallHeader& header = job.header;
  header.placement_hash = placements_[placement].placement.hash();
  header.handle_call = job.cached ? 1 : 0;  // the kernel puts the handle's own number there
  header.row_bytes = static_cast<std::uint32_t>(job.source->row_bytes());
  header.scale_bytes = static_cast<std::uint32_t>(job.source->scale_bytes());
  header.operation = protocol::Operation::dispatch;
  header.layout = static_cast<std::uint8_t>(job.cached ? job.handle->layout : options.layout);
  header.mode = static_cast<std::uint8_t>(job.cached ? job.handle->mode : options.mode.value_or(options_.mode));
  header.top_k = static_cast<std::uint8_t>(job.cached ? job.handle->top_k() : top_k_of(input.topk_ids));
  if (static_cast<Mode>(header.mode) == Mode::latency && input.rows.shape[0] > protocol::kMostFlaggedTokens)
    usage_error("mode = latency with {} tokens; it is made for few, at most {}: use throughput", input.rows.shape[0],
                protocol::kMostFlaggedTokens);
  if (!job.cached) {
    const HandleShape shape =
        handle_shape(shape_, job.layout_options, static_cast<Layout>(header.layout), static_cast<Mode>(header.mode), header.top_k);
    job.handle =
        std::make_shared<DeviceHandle>(shape, blocks_->take(handle_bytes(shape), stream), counts_pool_->take(), input.rows.shape[0]);
    job.handle->stream = stream;
    job.handle->exchange_id = id_;
    job.handle->call = last_call_;
    job.handle->placement = placement;
    job.handle->placement_hash = header.placement_hash;
  }
  lease_buffer(job);
  const HandleShape& made = job.handle->shape;
  // Memory that only `finish` makes is not there yet when the first half runs.
  const bool has_output = halves == Halves::together || !options.copy_out || options.out_rows;
  job.pads = !job.cached && has_output && made.is_expert_layout() && made.mode == Mode::latency && made.local_experts > 0 &&
             cuda::can_pad(shape_, made.top_k);
  // Asked only where it matters: the answer costs calls of the CUDA runtime.
  const bool is_sorted = made.is_expert_layout() || made.gather_map;
  job.sorts_beside = made.mode == Mode::throughput && is_sorted && cuda::moves_in_bulk(source_args(job));
  // Own rows of an exact dispatch have no memory before the host knows the counts.
  const bool is_placed_early = has_output && job.sorts_beside && made.is_expert_layout() && made.local_experts > 0 &&
                               budget_.multiprocessors >= cuda::kFewestOwnBlocks &&
                               (job.cached || (options.sizing == Sizing::capacity && cuda::can_place_own(shape_)));
  if (job.pads || is_placed_early) job.output = place_output(job, stream);
  job.places_own = is_placed_early && reinterpret_cast<std::uintptr_t>(job.output->rows) % 16 == 0;  // bulk copies need that
  return job;
}

void CudaEngine::check_dispatch_memory(const CudaDispatch& job) const {
  check_memory("rows", job.input.rows);
  check_memory("scales", job.input.scales);
  check_memory("topk_ids", job.input.topk_ids);
  check_memory("topk_weights", job.input.topk_weights);
  check_memory("out_rows", job.options.out_rows);
  check_memory("out_scales", job.options.out_scales);
  check_memory("waits", job.options.waits);
}

void CudaEngine::lease_buffer(CudaDispatch& job) {
  const auto layout = static_cast<Layout>(job.header.layout);
  const auto mode = static_cast<Mode>(job.header.mode);
  job.in_place = !job.options.copy_out && (layout == Layout::rank_slots || (layout == Layout::token_major && mode == Mode::throughput));
  receive_board_->reserve("receive buffers");
  const LeaseBoard::Holder holder{last_call_, layout};
  job.buffer = receive_board_->front();
  job.lease = receive_board_->lease(holder);
  if (job.in_place || job.options.copy_out) return;
  expert_board_->reserve("buffers of expert rows");
  job.expert_buffer = expert_board_->front();
  job.expert_lease = expert_board_->lease(holder);
}

cuda::RoutingArgs CudaEngine::routing_args(const CudaDispatch& job) const {
  cuda::RoutingArgs args;
  args.num_tokens = static_cast<std::int32_t>(job.handle->tokens);
  args.top_k = job.header.top_k;
  args.table = tables_[job.handle->placement].view;
  args.local_experts = job.handle->shape.local_experts;
  if (job.cached) return args;
  args.ids = matrix(job.input.topk_ids);
  args.wide_ids = job.input.topk_ids.dtype == Dtype::int64;
  if (job.input.topk_weights) args.weights = matrix(job.input.topk_weights);
  args.token_base = static_cast<std::uint32_t>(job.options.token_base);
  args.validate = options_.validate;
  return args;
}

cuda::SourceArgs CudaEngine::source_args(const CudaDispatch& job) const {
  const ConstTensorView& rows = job.input.rows;
  cuda::SourceArgs args;
  args.rows = static_cast<const std::byte*>(rows.data);
  args.row_stride = rows.strides[0] * size_of(rows.dtype);
  args.row_bytes = job.source->row_bytes();
  args.dtype = rows.dtype;
  args.hidden_size = static_cast<std::int32_t>(rows.shape[1]);
  args.scale_columns = static_cast<std::int32_t>(job.source->scale_columns());
  args.scale_element = args.scale_columns == 0 ? 0 : static_cast<std::int32_t>(job.source->scale_bytes() / args.scale_columns);
  args.quantise = job.options.quantise.has_value();
  if (args.quantise) args.format = *job.options.quantise;
  if (job.input.scales) args.scales = matrix(job.input.scales);
  return args;
}

std::int64_t CudaEngine::expert_capacity(const CudaDispatch& job) const {
  const HandleShape& shape = job.handle->shape;
  return shape.layout == Layout::expert_padded ? shape.expert_width : job.layout_options.expert_capacity;
}

cuda::GroupArgs CudaEngine::group_args(const CudaDispatch& job) const {
  const HandleShape& shape = job.handle->shape;
  return {.layout = shape.layout,
          .alignment = job.layout_options.alignment,
          .expert_capacity = expert_capacity(job),
          .drop = job.layout_options.drop,
          .local_experts = shape.local_experts};
}

cuda::LayoutArgs CudaEngine::layout_args(const CudaDispatch& job) const {
  const HandleShape& shape = job.handle->shape;
  cuda::LayoutArgs args;
  static_cast<cuda::GroupArgs&>(args) = group_args(job);
  args.context = arena_->context();
  args.handle = job.handle->view;
  args.mode = shape.mode;
  args.gather_map = shape.gather_map;
  args.output_rows = shape.output_rows;
  args.map_rows = shape.map_rows;
  args.table = layout_table_;
  args.landing_warps = job.sorts_beside ? budget_.multiprocessors * cuda::kClerks : 0;
  args.last = true;
  return args;
}

cuda::OwnRows CudaEngine::own_rows(const CudaDispatch& job) const {
  if (!job.places_own) return {};
  return {.rows = job.output->rows, .groups = group_args(job), .counts = own_counts_, .places = own_places_};
}

cuda::PlanArgs CudaEngine::plan_args(const CudaDispatch& job) const {
  const HandleShape& shape = job.handle->shape;
  const bool is_exact = job.options.sizing == Sizing::exact;
  const bool is_bounded = shape.layout == Layout::expert_major && !is_exact;
  return {.context = context(job.options.waits),
          .header = job.header,
          .buffer = job.buffer,
          .routing = routing_args(job),
          .handle = job.handle->view,
          .numbers = row_numbers_,
          .limits = {.expert_capacity = expert_capacity(job),
                     .max_layout_rows = is_bounded ? options_.max_expert_rows : 0,
                     .alignment = job.layout_options.alignment,
                     .drop = job.layout_options.drop,
                     .expert_layout = shape.is_expert_layout()},
          .counts = counts_,
          // What only an exact dispatch waits for costs the device a trip to the host's memory.
          .host = is_exact ? job.handle->counts.get() : nullptr,
          .own = own_rows(job)};
}

// `last`: no layout follows.
cuda::MoveArgs CudaEngine::move_args(const CudaDispatch& job, bool last) const {
  cuda::MoveArgs args;
  static_cast<cuda::PlanArgs&>(args) = plan_args(job);
  args.source = source_args(job);
  if (!last) args.table = layout_table_;
  args.cached = job.cached;
  args.last = last;
  args.blocks = budget_.multiprocessors;
  return args;
}

void CudaEngine::enqueue_dispatch(CudaDispatch& job, cudaStream_t stream) {
  const bool latency = static_cast<Mode>(job.header.mode) == Mode::latency;
  const HandleShape& shape = job.handle->shape;
  const bool lays_out = !job.cached && !job.pads && (shape.is_expert_layout() || shape.is_compacted() || shape.gather_map);
  const cuda::MoveArgs move = move_args(job, !lays_out);
  const cuda::LayoutArgs layout = layout_args(job);
  if (!job.cached) job.handle->counts->call = 0;
  if (latency) {
    cuda::PadArgs pad;
    if (job.pads) {
      pad = {.asked = true,
             .spread = spread_args(job),
             .capacity = expert_capacity(job),
             .alignment = job.layout_options.alignment,
             .drop = job.layout_options.drop};
    }
    phase("dispatch slots", stream, [&] { cuda::launch_slots(move, pad, stream); });
  } else {
    phase("dispatch rows", stream, [&] { cuda::launch_move(move, stream); });
  }
  if (lays_out) phase("dispatch layout", stream, [&] { cuda::launch_layout(layout, stream); });
  cuda_check(cudaGetLastError(), "enqueueing a dispatch");
}

cuda::HostCounts CudaEngine::await_counts(const DeviceHandle& handle) {
  // The device has the same deadline for each of its waits; this one only ends what never started.
  const Deadline deadline = Deadline::after_ms(3 * options_.timeout_ms);
  const volatile cuda::HostCounts& counts = *handle.counts;
  for (int spins = 0; counts.call == 0; ++spins) {
    check();
    if (spins > 1000) std::this_thread::sleep_for(std::chrono::microseconds(20));
    if (!deadline.expired()) continue;
    throw TransportError({.kind = FailureKind::timeout,
                          .phase = Phase::dispatch_counts,
                          .rank = world_.rank(),
                          .peer = world_.rank(),
                          .epoch = handle.call,
                          .detail = "the kernels of this dispatch have not run; is the GPU busy with kernels that wait for each other?"});
  }
  std::atomic_thread_fence(std::memory_order_acquire);
  check();  // a call that has failed tells counts as well, behind its failure
  return {.call = counts.call, .num_rows = counts.num_rows, .layout_rows = counts.layout_rows, .map_rows = counts.map_rows};
}

Received CudaEngine::finish_dispatch(CudaDispatch& job, cudaStream_t stream) {
  if (!job.cached && job.options.sizing == Sizing::exact) job.handle->set_counts(await_counts(*job.handle));
  const std::vector<std::int64_t>& rows = job.handle->rows_shape();
  continue_on(job, stream);
  auto state = std::make_shared<ReceivedState>();
  state->handle = Handle(job.handle);
  const RowSource& source = *job.source;
  state->rows = shaped(arena_->rows(job.buffer), source.row_dtype(), rows, source.hidden_size());
  if (source.scale_bytes() > 0) state->scales = shaped(arena_->scales(job.buffer), source.scale_dtype(), rows, source.scale_columns());
  state->lease = job.lease;
  if (!job.in_place) {
    if (!job.output) job.output = place_output(job, stream);
    if (!job.pads) {
      phase("dispatch spread", stream, [&] { cuda::launch_spread(spread_args(job), stream); });
      cuda_check(cudaGetLastError(), "enqueueing the copy of received rows");
    }
    state->rows.data = job.output->rows;
    if (state->scales) state->scales.data = job.output->scales;
    state->lease = std::move(job.output->lease);
  }
  state->before_free = [stream, device = device_](void* reader) {
    const CudaDeviceScope scope(device);
    if (reader != nullptr) order_streams(static_cast<cudaStream_t>(reader), stream, value_or_throw(make_cuda_event()));
  };
  return Received(std::move(state));
}

cuda::SpreadArgs CudaEngine::spread_args(const CudaDispatch& job) const {
  return {.context = arena_->context(),
          .handle = job.handle->view,
          .buffer = job.buffer,
          .layout = job.handle->layout,
          .mode = job.handle->mode,
          .row_bytes = job.source->row_bytes(),
          .scale_bytes = job.source->scale_bytes(),
          .rows = job.output->rows,
          .scales = job.output->scales,
          .output_rows = job.handle->total_rows(),
          .own_placed = job.places_own,
          .zero_padding = job.options.zero_padding,
          .blocks = multiprocessors_of(device_)};
}

// Chooses the memory of rows that do not stay where they landed: the caller's, memory of the Received, or a lease on expert memory.
OutputRows CudaEngine::place_output(const CudaDispatch& job, cudaStream_t stream) {
  const RowSource& source = *job.source;
  const std::int64_t rows = job.handle->total_rows();
  const bool has_scales = source.scale_bytes() > 0;
  if (job.options.copy_out && job.options.allocate_out) {
    const OutMemory given = job.options.allocate_out(rows, source.row_bytes(), source.scale_bytes());
    return {.rows = static_cast<std::byte*>(given.rows), .scales = static_cast<std::byte*>(given.scales), .lease = nullptr};
  }
  if (job.options.copy_out && job.options.out_rows) {
    const TensorView &out_rows = job.options.out_rows, &out_scales = job.options.out_scales;
    if (out_rows.shape[0] < rows || (has_scales && out_scales.shape[0] < rows)) {
      usage_error("out_rows has {} rows and out_scales {}; this dispatch may fill {}: give as many", out_rows.shape[0],
                  out_scales ? out_scales.shape[0] : 0, rows);
    }
    return {.rows = static_cast<std::byte*>(out_rows.data), .scales = static_cast<std::byte*>(out_scales.data), .lease = nullptr};
  }
  const std::int64_t row_part = protocol::align_up(rows * source.row_bytes(), 64);
  const std::int64_t bytes = row_part + rows * source.scale_bytes();
  OutputRows output;
  if (job.options.copy_out) {
    auto block = blocks_->take(bytes, stream);
    output.rows = block.get();
    output.lease = std::move(block);
  } else {
    output.rows = expert_memory(job.expert_buffer, bytes, stream);
    output.lease = job.expert_lease;
  }
  if (has_scales) output.scales = output.rows + row_part;
  return output;
}

// All free buffers grow at once: calls that are captured later must find theirs.
std::byte* CudaEngine::expert_memory(int buffer, std::int64_t bytes, cudaStream_t stream) {
  if (expert_memory_[buffer].bytes < bytes) {
    std::vector<int> growing = expert_board_->free_buffers();
    growing.push_back(buffer);
    for (const int each : growing) {
      ExpertMemory& memory = expert_memory_[each];
      if (memory.bytes >= bytes) continue;
      if (memory.data != nullptr) {  // its last user's stream may be gone
        orders_->expert[each].enter(stream);
        BlockPool::continue_on(memory.data, stream);
      }
      memory = {blocks_->take(bytes, stream), bytes};
    }
  }
  const std::shared_ptr<std::byte>& data = expert_memory_[buffer].data;
  if (is_capturing(stream)) captured_expert_memory_.insert(data);
  return data.get();
}

void CudaEngine::enter_buffers(const CudaDispatch& job, cudaStream_t stream) {
  orders_->receive[job.buffer].enter(stream);
  if (job.expert_lease != nullptr) orders_->expert[job.expert_buffer].enter(stream);
}

void CudaEngine::continue_on(const CudaDispatch& job, cudaStream_t stream) {
  orders_->receive[job.buffer].continue_on(stream);
  if (job.expert_lease != nullptr) orders_->expert[job.expert_buffer].continue_on(stream);
}

Received CudaEngine::dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached) {
  const CudaDeviceScope scope(device_);
  const auto stream = static_cast<cudaStream_t>(options.stream);
  CudaDispatch job = admit(stream, [&] { return make_dispatch(input, options, cached, Halves::together); });
  order_.enter(stream);
  enter_buffers(job, stream);
  enqueue_dispatch(job, stream);
  order_.leave(stream);
  return finish_dispatch(job, stream);
}

Pending<Received> CudaEngine::start_dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached) {
  const CudaDeviceScope scope(device_);
  const auto caller = static_cast<cudaStream_t>(options.stream);
  auto job = std::make_shared<CudaDispatch>(admit(caller, [&] { return make_dispatch(input, options, cached, Halves::apart); }));
  order_streams(caller, stream_.get(), entered_);
  order_.enter(stream_.get());
  enter_buffers(*job, stream_.get());
  enqueue_dispatch(*job, stream_.get());
  order_.leave(stream_.get());
  auto pending = std::make_shared<PendingState<Received>>();
  auto done = std::make_shared<CudaEvent>(value_or_throw(make_cuda_event()));
  cuda_check(cudaEventRecord(done->get(), stream_.get()), "cudaEventRecord");
  pending->ready = [done] { return cudaEventQuery(done->get()) == cudaSuccess; };
  pending->finish = [this, job, done, caller] {
    const CudaDeviceScope device(device_);
    cuda_check(cudaStreamWaitEvent(caller, done->get()), "cudaStreamWaitEvent");
    Received received = finish_dispatch(*job, caller);  // what is left is local: it runs on the caller's stream
    job->lease = job->expert_lease = nullptr;           // the result alone holds the rows from now on
    return received;
  };
  return Pending<Received>(std::move(pending));
}

}  // namespace tokenyard::exchange_internal
