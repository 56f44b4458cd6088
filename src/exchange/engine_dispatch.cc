// The steps of a dispatch.

#include <algorithm>
#include <cstring>

#include "core/usage.h"
#include "exchange/engine.h"
#include "exchange/memory_plan.h"
#include "kernels/cpu/kernels.h"
#include "protocol/overflow.h"
#include "protocol/record.h"

namespace tokenyard::exchange_internal {
namespace {

std::string describe(const protocol::Overflow& overflow, int rank, std::int64_t local) {
  if (overflow.excess == protocol::Excess::receive_rows) {
    return fmt::format("rank {} would receive {} rows, receive_rows is {}; raise it, or send fewer tokens, then clear()", rank,
                       overflow.needed, overflow.capacity);
  }
  if (overflow.excess == protocol::Excess::expert_capacity) {
    return fmt::format(
        "local expert {} of rank {} would receive {} rows, its capacity is {}; raise expert_capacity or set drop, then clear()", local,
        rank, overflow.needed, overflow.capacity);
  }
  return fmt::format("rank {} would need {} expert rows, max_expert_rows is {}; raise it, then clear()", rank, overflow.needed,
                     overflow.capacity);
}

}  // namespace

DispatchJob Engine::make_dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached, std::uint64_t call) {
  if (placements_.empty()) usage_error("dispatch without a placement; register one with Exchange::add");
  DispatchJob job;
  job.input = input;
  job.options = options;
  if (cached != nullptr) {
    check_handle(*this, *cached);
    job.cached = std::static_pointer_cast<const HandleState>(cached->state());
  }
  check_dispatch(*this, input, options, job.cached.get());
  job.placement = placement_of(options, job.cached.get());
  if (!job.cached) check_values(*this, input, job.placement);
  job.source.emplace(input, options.quantise);
  job.header.call = call;
  job.header.placement_hash = placements_[job.placement].placement.hash();
  job.header.handle_call = job.cached ? job.cached->call : 0;
  job.header.row_bytes = static_cast<std::uint32_t>(job.source->row_bytes());
  job.header.scale_bytes = static_cast<std::uint32_t>(job.source->scale_bytes());
  job.header.operation = protocol::Operation::dispatch;
  job.header.layout = static_cast<std::uint8_t>(job.cached ? job.cached->layout : options.layout);
  job.header.mode = static_cast<std::uint8_t>(job.cached ? job.cached->mode : options.mode.value_or(options_.mode));
  job.header.top_k = static_cast<std::uint8_t>(job.cached ? job.cached->top_k() : top_k_of(input.topk_ids));
  reserve_buffers(job);
  return job;
}

void Engine::reserve_buffers(DispatchJob& job) {
  transport_->reserve_receive_buffer();
  job.holds_receive_buffer = true;
  if (job.in_place() || job.options.copy_out) return;
  try {
    expert_board_->reserve("buffers of expert rows");
    job.holds_expert_buffer = true;
  } catch (const UsageError&) {
    transport_->unreserve_receive_buffer();
    throw;
  }
}

Expected<Received> Engine::dispatch_steps(DispatchJob& job) {
  const Span span(*this, "dispatch", job.header.call);
  if (auto begun = transport_->begin_call(job.header); !begun) return unexpected(begun.error());
  std::shared_ptr<HandleState> fresh;
  if (!job.cached) {
    auto planned = plan_dispatch(job);
    if (!planned) return unexpected(planned.error());
    fresh = std::move(*planned);
  }
  const HandleState& handle = job.cached ? *job.cached : *fresh;
  auto landing = [&] {
    const Span rows(*this, "dispatch rows", job.header.call);
    return transport_->exchange_rows({.header = job.header,
                                      .plan = &handle.sent,
                                      .source = &*job.source,
                                      .weights = job.input.topk_weights,
                                      .known = job.cached ? &job.cached->received : nullptr,
                                      .mode = job.mode(),
                                      .layout = job.layout()});
  }();
  if (!landing) return unexpected(landing.error());
  job.holds_receive_buffer = false;
  const Span layout(*this, "dispatch layout", job.header.call);
  if (fresh) {
    collect(*fresh, *landing);
    if (auto laid = lay_out(*fresh, layout_options(job), shape_); !laid) return unexpected(laid.error());
  }
  return assemble(job, job.cached ? job.cached : fresh, std::move(*landing));
}

// Who gets what, and in throughput mode where: counts from everybody, then prefix sums over the sources.
Expected<std::shared_ptr<HandleState>> Engine::plan_dispatch(const DispatchJob& job) {
  auto handle = std::make_shared<HandleState>();
  handle->exchange_id = id_;
  handle->call = job.header.call;
  handle->placement = job.placement;
  handle->placement_hash = job.header.placement_hash;
  handle->layout = job.layout();
  handle->mode = job.mode();
  {
    const Span plan(*this, "dispatch plan", job.header.call);
    handle->sent = make_send_plan(
        {.topk_ids = job.input.topk_ids, .top_k = job.header.top_k, .rank = world_.rank(), .token_base = job.options.token_base},
        placements_[job.placement].placement.table().view(), shape_);
  }
  {
    const std::lock_guard lock(mutex_);
    status_.invalid_ids += handle->sent.invalid_ids;
    status_.lost_ids += handle->sent.lost_ids;
  }
  if (job.mode() == Mode::latency) return handle;
  const Span span(*this, "dispatch counts", job.header.call);
  std::vector<std::int32_t> counts;
  if (auto counted = transport_->exchange_counts(job.header, handle->sent.counts, counts); !counted) return unexpected(counted.error());
  if (auto fits = decide_overflow(job, counts); !fits) return unexpected(fits.error());
  std::vector<std::int64_t> base(shape_.ranks, 0);
  for (int source = 0; source < world_.rank(); ++source) {
    for (std::int64_t d = 0; d < shape_.ranks; ++d) base[d] += counts[source * shape_.count_words() + d];
  }
  offset_slots(handle->sent, base);
  return handle;
}

// From the full count matrix, so that all ranks decide the same in the same call and nothing is written out of bounds.
Expected<void> Engine::decide_overflow(const DispatchJob& job, std::span<const std::int32_t> counts) const {
  const std::int64_t words = shape_.count_words();
  std::vector<std::int64_t> total(words, 0);
  for (std::int64_t source = 0; source < shape_.ranks; ++source) {
    for (std::int64_t word = 0; word < words; ++word) total[word] += counts[source * words + word];
  }
  const LayoutOptions layout = layout_options(job);
  const bool is_bounded = job.layout() == Layout::expert_major && layout.sizing == Sizing::capacity;
  const protocol::CountLimits limits{.receive_rows = shape_.receive_rows,
                                     .expert_capacity = job.layout() == Layout::expert_padded && layout.expert_capacity == 0
                                                            ? shape_.receive_rows
                                                            : layout.expert_capacity,
                                     .max_layout_rows = is_bounded ? layout.max_expert_rows : 0,
                                     .alignment = layout.alignment,
                                     .drop = layout.drop,
                                     .expert_layout = job.layout() == Layout::expert_major || job.layout() == Layout::expert_padded};
  for (int rank = 0; rank < shape_.ranks; ++rank) {
    protocol::ExpertTally experts;
    for (std::int64_t local = 0; local < shape_.max_local_experts; ++local) {
      experts.add(limits, local, total[shape_.instance_word(rank, local)]);
    }
    const protocol::Overflow found = protocol::find_overflow(limits, total[rank], experts);
    if (found.excess == protocol::Excess::none) continue;
    Failure failure{.kind = FailureKind::overflow, .phase = Phase::dispatch_counts, .rank = world_.rank(), .peer = rank};
    failure.expected = found.capacity;
    failure.seen = found.needed;
    failure.detail = describe(found, rank, experts.excess_local);
    return unexpected(std::move(failure));
  }
  return {};
}

LayoutOptions Engine::layout_options(const DispatchJob& job) const {
  return {.sizing = job.options.sizing,
          .gather_map = job.options.gather_map,
          .alignment = job.options.alignment,
          .expert_capacity = job.options.expert_capacity,
          .drop = job.options.drop,
          .local_experts = static_cast<int>(placements_[job.placement].placement.local_experts(world_.rank()).size()),
          .max_expert_rows = options_.max_expert_rows};
}

// Reads the records out of the receive buffer: the handle must outlive the lease.
void Engine::collect(HandleState& handle, const Landing& landing) const {
  ReceivedRows& received = handle.received;
  const int k = handle.top_k();
  received.source_begin.assign(1, 0);
  for (const std::int64_t count : landing.count) received.source_begin.push_back(received.source_begin.back() + count);
  const std::int64_t rows = received.source_begin.back();
  received.source_token.resize(rows);
  received.partial_slot.resize(rows);
  received.local_ids.resize(rows * k);
  received.weights.resize(rows * k);
  for (std::size_t source = 0; source < landing.count.size(); ++source) {
    for (std::int64_t r = 0; r < landing.count[source]; ++r) {
      const protocol::Record record{landing.records + (landing.begin[source] + r) * shape_.record_bytes(), k};
      const std::int64_t i = received.source_begin[source] + r;
      received.source_token[i] = record.source_token();
      received.partial_slot[i] = record.partial_slot();
      std::copy_n(record.local_ids(), k, &received.local_ids[i * k]);
      std::copy_n(record.weights(), k, &received.weights[i * k]);
    }
  }
}

Expected<Received> Engine::assemble(DispatchJob& job, const std::shared_ptr<const HandleState>& handle, Landing landing) {
  auto state = std::make_shared<ReceivedState>();
  state->handle = Handle(handle);
  const RowSource& source = *job.source;
  auto shaped = [&handle](std::byte* data, Dtype dtype, std::int64_t columns) {
    const auto& shape = handle->metadata.rows_shape;
    return shape.size() == 2 ? TensorView(data, dtype, {shape[0], shape[1], columns}) : TensorView(data, dtype, {shape[0], columns});
  };
  if (job.in_place()) {
    state->rows = shaped(landing.rows, source.row_dtype(), source.hidden_size());
    if (source.scale_bytes() > 0) state->scales = shaped(landing.scales, source.scale_dtype(), source.scale_columns());
    state->lease = std::move(landing.lease);
    return Received(std::move(state));
  }
  state->rows = shaped(nullptr, source.row_dtype(), source.hidden_size());
  if (source.scale_bytes() > 0) state->scales = shaped(nullptr, source.scale_dtype(), source.scale_columns());
  if (auto placed = place_output(job, *handle, *state); !placed) return unexpected(placed.error());
  fill_output(job, *handle, landing, *state);
  return Received(std::move(state));
}

// Chooses the memory of rows that do not stay where they landed: the caller's, memory of the Received, or a lease on expert memory.
Expected<void> Engine::place_output(DispatchJob& job, const HandleState& handle, ReceivedState& state) {
  const std::int64_t rows = handle.metadata.total_rows();
  const std::int64_t row_part = protocol::align_up(rows * job.source->row_bytes(), 64);
  const std::int64_t bytes = row_part + rows * job.source->scale_bytes();
  if (job.options.copy_out && job.options.out_rows) {
    if (job.options.out_rows.shape[0] < rows || (state.scales && job.options.out_scales.shape[0] < rows)) {
      Failure failure{
          .kind = FailureKind::overflow, .phase = Phase::dispatch_rows, .expected = job.options.out_rows.shape[0], .seen = rows};
      failure.detail =
          "out_rows or out_scales has fewer rows than arrived; give more, or use sizing = capacity to know before, then clear()";
      return unexpected(std::move(failure));
    }
    state.rows.data = job.options.out_rows.data;
    state.scales.data = job.options.out_scales.data;
    return {};
  }
  RowMemory memory;
  if (job.options.copy_out) {
    memory = allocate_rows(bytes);
    state.lease = memory.data;
  } else {
    RowMemory& kept = expert_memory_[expert_board_->front()];
    if (kept.bytes < bytes) kept = allocate_rows(bytes);
    memory = kept;
    auto lease = expert_board_->lease({job.header.call, job.layout()});
    job.holds_expert_buffer = false;
    state.lease = std::shared_ptr<void>(memory.data.get(), [kept_alive = memory.data, lease = std::move(lease)](void*) {});
  }
  state.rows.data = memory.data.get();
  if (state.scales) state.scales.data = memory.data.get() + row_part;
  return {};
}

// Copies every row, and its scales, from where it landed to every place it has in the layout.
void Engine::fill_output(const DispatchJob& job, const HandleState& handle, const Landing& landing, const ReceivedState& state) {
  const std::int64_t row_bytes = job.source->row_bytes();
  const std::int64_t scale_bytes = job.source->scale_bytes();
  auto* const rows = static_cast<std::byte*>(state.rows.data);
  auto* const scales = static_cast<std::byte*>(state.scales.data);
  const ReceivedRows& received = handle.received;
  const int k = handle.top_k();
  const bool stream = cpu::should_stream(handle.metadata.total_rows() * row_bytes);
  constexpr std::int64_t kGrain = 8;
  pool_.parallel_for(received.size(), kGrain, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto after = std::upper_bound(received.source_begin.begin(), received.source_begin.end(), i);
      const std::int64_t source = after - received.source_begin.begin() - 1;
      const bool by_token = handle.mode == Mode::latency;
      const std::int64_t from = landing.begin[source] + (by_token ? received.source_token[i] : i - received.source_begin[source]);
      auto copy_to = [&](std::int64_t to) {
        cpu::copy_row(rows + to * row_bytes, landing.rows + from * row_bytes, row_bytes, stream);
        if (scale_bytes != 0) std::memcpy(scales + to * scale_bytes, landing.scales + from * scale_bytes, scale_bytes);
      };
      if (handle.layout == Layout::token_major) copy_to(i);
      if (handle.layout == Layout::rank_slots) copy_to(source * shape_.max_tokens_per_rank + received.source_token[i]);
      for (int j = 0; handle.is_expert_layout() && j < k; ++j) {
        if (handle.expert_row[i * k + j] >= 0) copy_to(handle.expert_row[i * k + j]);
      }
    }
    if (stream) cpu::stream_fence();
  });
  if (!job.options.zero_padding || !handle.is_expert_layout()) return;
  for (std::int64_t row = 0; row < handle.metadata.total_rows(); ++row) {
    if (handle.metadata.source_rank[row] >= 0) continue;
    std::memset(rows + row * row_bytes, 0, row_bytes);
    if (scale_bytes != 0) std::memset(scales + row * scale_bytes, 0, scale_bytes);
  }
}

}  // namespace tokenyard::exchange_internal
