#include "exchange/device_handle.h"

#include <utility>

#include "core/usage.h"
#include "exchange/cuda_stream.h"

namespace tokenyard::exchange_internal {
namespace {

// Lays arrays one behind the other, each on a cache line; with a null base it only counts.
class Placer {
 public:
  explicit Placer(std::byte* base) : base_(base) {}
  template <class T>
  T* place(std::int64_t count) {
    T* const at = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + end_);
    end_ = protocol::align_up(end_ + count * static_cast<std::int64_t>(sizeof(T)), protocol::kCacheLine);
    return at;
  }
  std::int64_t bytes() const { return end_; }

 private:
  std::byte* base_;
  std::int64_t end_ = 0;
};

std::int64_t place_handle(const HandleShape& shape, std::byte* base, cuda::HandleView& view) {
  Placer placer(base);
  const std::int64_t k = shape.top_k;
  const std::int64_t sent = shape.arena.max_tokens_per_rank * shape.arena.ranks;
  view.top_k = shape.top_k;
  view.header = placer.place<cuda::HandleView::Header>(1);
  view.slots = placer.place<std::int32_t>(sent);
  view.k_masks = placer.place<std::uint64_t>(sent);
  view.sent_counts = placer.place<std::int32_t>(shape.arena.ranks);
  view.rank_counts = placer.place<std::int32_t>(shape.arena.ranks);
  view.source_begin = placer.place<std::int32_t>(shape.arena.ranks + 1);
  view.source_rank = placer.place<std::int32_t>(shape.rows);
  view.source_token = placer.place<std::int32_t>(shape.rows);
  view.partial_slot = placer.place<std::int32_t>(shape.rows);
  view.local_ids = placer.place<std::int32_t>(shape.rows * k);
  view.weights = placer.place<float>(shape.rows * k);
  view.expert_counts = placer.place<std::int32_t>(shape.local_experts);
  view.expert_offsets = placer.place<std::int32_t>(shape.local_experts + 1);
  view.dropped = placer.place<std::int64_t>(shape.local_experts);
  if (shape.gather_map) view.gather_map = placer.place<std::int32_t>(shape.map_rows);
  if (shape.is_expert_layout() || shape.is_compacted()) {
    view.output_row = placer.place<std::int32_t>(shape.rows * (shape.is_compacted() ? 1 : k));
    view.out_weights = placer.place<float>(shape.output_rows * (shape.is_compacted() ? k : 1));
    view.out_source_rank = placer.place<std::int32_t>(shape.output_rows);
    view.out_source_token = placer.place<std::int32_t>(shape.output_rows);
  }
  if (shape.is_compacted()) view.out_local_ids = placer.place<std::int32_t>(shape.output_rows * k);
  if (shape.is_expert_layout()) view.out_source_k = placer.place<std::int32_t>(shape.output_rows);
  if (shape.layout == Layout::expert_padded) view.ranges = placer.place<std::int32_t>(shape.local_experts * shape.arena.ranks * 2);
  if (shape.layout == Layout::rank_slots) view.present = placer.place<std::uint8_t>(shape.rows);
  return placer.bytes();
}

template <class T>
ConstTensorView tensor(const T* data, Dtype dtype, const std::vector<std::int64_t>& shape) {
  ConstTensorView view;
  view.data = data;
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

ConstTensorView list(const std::int32_t* data, std::int64_t count) { return tensor(data, Dtype::int32, {count}); }

}  // namespace

std::shared_ptr<std::byte> BlockPool::take(std::int64_t bytes, cuda::Stream stream) {
  DeviceBuffer buffer;
  {
    const std::lock_guard lock(mutex_);
    const auto found = free_.lower_bound(bytes);
    if (found != free_.end() && found->first <= 2 * bytes + (1 << 20)) {
      buffer = std::move(found->second);
      free_.erase(found);
    }
  }
  if (!buffer) {
    if (is_capturing(stream)) {
      usage_error(
          "a graph is being captured, and this call needs {} bytes of device memory that no earlier call has left; make the same "
          "call once before the capture, and release what it returned",
          bytes);
    }
    buffer = value_or_throw(make_device_buffer(device_, static_cast<std::size_t>(bytes)));
  }
  auto* const data = buffer.data();
  auto keep = std::make_shared<DeviceBuffer>(std::move(buffer));
  return {data, [pool = shared_from_this(), keep](std::byte*) {
            const std::lock_guard lock(pool->mutex_);
            const auto size = static_cast<std::int64_t>(keep->bytes());
            pool->free_.emplace(size, std::move(*keep));
          }};
}

std::shared_ptr<cuda::HostCounts> CountsPool::take() {
  constexpr std::size_t kSlab = 64;
  const std::lock_guard lock(mutex_);
  if (free_.empty()) {
    slabs_.push_back(value_or_throw(make_pinned_buffer(kSlab * sizeof(cuda::HostCounts))));
    for (std::size_t i = 0; i < kSlab; ++i) free_.push_back(new (slabs_.back().as<cuda::HostCounts>() + i) cuda::HostCounts);
  }
  cuda::HostCounts* const counts = free_.back();
  free_.pop_back();
  return {counts, [pool = shared_from_this()](cuda::HostCounts* back) {
            const std::lock_guard returning(pool->mutex_);
            pool->free_.push_back(back);
          }};
}

HandleShape handle_shape(const protocol::ArenaShape& arena, const LayoutOptions& options, Layout layout, Mode mode, int top_k) {
  HandleShape shape{.arena = arena, .layout = layout, .mode = mode, .top_k = top_k, .local_experts = options.local_experts};
  shape.gather_map = options.gather_map;
  shape.rows = mode == Mode::latency ? arena.ranks * arena.max_tokens_per_rank : arena.receive_rows;
  shape.output_rows = shape.rows;
  if (layout == Layout::expert_padded) {
    shape.output_rows = options.local_experts * (options.expert_capacity == 0 ? arena.receive_rows : options.expert_capacity);
  } else if (layout == Layout::expert_major) {
    shape.output_rows = options.max_expert_rows;
    if (shape.output_rows == 0 || options.sizing == Sizing::exact) {
      shape.output_rows =
          protocol::align_up(arena.receive_rows * top_k + std::int64_t{options.local_experts} * (options.alignment - 1), options.alignment);
    }
  }
  if (shape.gather_map) {
    shape.map_rows = options.max_expert_rows;
    if (shape.map_rows == 0 || options.sizing == Sizing::exact) shape.map_rows = arena.receive_rows * top_k;
  }
  return shape;
}

std::int64_t handle_bytes(const HandleShape& shape) {
  cuda::HandleView view;
  return place_handle(shape, nullptr, view);
}

DeviceHandle::DeviceHandle(const HandleShape& handle_shape, std::shared_ptr<std::byte> memory,
                           std::shared_ptr<cuda::HostCounts> host_counts, std::int64_t num_tokens)
    : shape(handle_shape), block(std::move(memory)), counts(std::move(host_counts)), tokens(num_tokens), map_rows(handle_shape.map_rows) {
  layout = shape.layout;
  mode = shape.mode;
  place_handle(shape, block.get(), view);
  if (layout == Layout::expert_padded)
    rows = {shape.local_experts, shape.local_experts == 0 ? 0 : shape.output_rows / shape.local_experts};
  else if (layout == Layout::rank_slots)
    rows = {shape.arena.ranks, shape.arena.max_tokens_per_rank};
  else
    rows = {shape.output_rows};
}

void DeviceHandle::set_counts(const cuda::HostCounts& known) {
  token_rows = known.num_rows;
  layout_rows = known.layout_rows;
  map_rows = known.map_rows;
  if (rows.size() == 1) rows[0] = known.layout_rows;
}

std::span<const std::int64_t> DeviceHandle::dropped() const {
  dropped_.resize(shape.local_experts);
  cuda_check(cudaMemcpy(dropped_.data(), view.dropped, dropped_.size() * sizeof(std::int64_t), cudaMemcpyDefault),
             "reading dropped counts");
  return dropped_;
}

ReceivedViews DeviceHandle::views() const {
  std::vector<std::int64_t> per_k = rows;
  per_k.push_back(shape.top_k);
  const bool expert_layout = is_expert_layout();
  const bool own_order = expert_layout || shape.is_compacted();
  ReceivedViews views;
  views.num_rows = list(&view.header->layout_rows, 1);
  if (!expert_layout) views.local_ids = tensor(own_order ? view.out_local_ids : view.local_ids, Dtype::int32, per_k);
  views.row_weights = tensor(own_order ? view.out_weights : view.weights, Dtype::float32, expert_layout ? rows : per_k);
  if (layout != Layout::rank_slots) {
    views.source_rank = tensor(own_order ? view.out_source_rank : view.source_rank, Dtype::int32, rows);
    views.source_token = tensor(own_order ? view.out_source_token : view.source_token, Dtype::int32, rows);
  }
  if (expert_layout) views.source_k = tensor(view.out_source_k, Dtype::int32, rows);
  views.expert_counts = list(view.expert_counts, shape.local_experts);
  if (layout == Layout::expert_major || shape.gather_map) views.expert_offsets = list(view.expert_offsets, shape.local_experts + 1);
  if (shape.gather_map) views.expert_rows = list(view.gather_map, map_rows);
  views.rank_counts = list(view.rank_counts, shape.arena.ranks);
  views.sent_counts = list(view.sent_counts, shape.arena.ranks);
  if (layout == Layout::expert_padded) views.ranges = tensor(view.ranges, Dtype::int32, {shape.local_experts, shape.arena.ranks, 2});
  if (layout == Layout::rank_slots) views.present = tensor(view.present, Dtype::uint8, rows);
  return views;
}

}  // namespace tokenyard::exchange_internal
