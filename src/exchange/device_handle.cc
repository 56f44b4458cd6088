#include "exchange/device_handle.h"

#include <utility>

#include "core/usage.h"
#include "exchange/cuda_stream.h"

namespace tokenyard::exchange_internal {
namespace {

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
  const std::size_t bytes = dropped_.size() * sizeof(std::int64_t);
  auto* const on = static_cast<cudaStream_t>(stream);
  cuda_check(cudaMemcpyAsync(dropped_.data(), view.dropped, bytes, cudaMemcpyDefault, on), "reading dropped counts");
  cuda_check(cudaStreamSynchronize(on), "reading dropped counts");
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
