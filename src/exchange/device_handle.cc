#include "exchange/device_handle.h"

#include <algorithm>
#include <utility>

#include "core/log.h"
#include "core/usage.h"

namespace tokenyard::exchange_internal {
namespace {

ConstTensorView list(const std::int32_t* data, std::int64_t count) { return dense_view(data, Dtype::int32, {count}); }

// Lets this thread allocate while it captures a graph: what is allocated is no part of the graph.
class BesideCapture {
 public:
  BesideCapture() { cuda_check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCapture(const BesideCapture&) = delete;
  BesideCapture& operator=(const BesideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

BlockPool::BlockPool(int device) : device_(device), stream_(value_or_throw(borrow_cuda_stream())) {
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location = {cudaMemLocationTypeDevice, device};
  cuda_check(cudaMemPoolCreate(&memory_, &properties), "cudaMemPoolCreate");
  std::uint64_t keep_all = ~std::uint64_t{0};
  cuda_check(cudaMemPoolSetAttribute(memory_, cudaMemPoolAttrReleaseThreshold, &keep_all), "cudaMemPoolSetAttribute");
}

BlockPool::~BlockPool() {
  const CudaDeviceScope scope(device_);
  free_.merge(free_captured_);
  for (const auto& [bytes, block] : free_) {
    try {
      block.order->enter(stream_.get());
    } catch (const std::exception& error) {
      log_info("memory of GPU {} is freed as it is: {}", device_, error.what());
    }
    cudaFreeAsync(block.data, stream_.get());
  }
  cudaStreamSynchronize(stream_.get());
  cudaMemPoolDestroy(memory_);
}

std::byte* BlockPool::allocate(std::int64_t bytes) {
  void* block = nullptr;
  const std::string what = fmt::format("{} bytes of memory on GPU {}", bytes, device_);
  const BesideCapture allowed;
  cuda_check(cudaMallocFromPoolAsync(&block, static_cast<std::size_t>(bytes), memory_, stream_.get()), what);
  cuda_check(cudaStreamSynchronize(stream_.get()), what);
  return static_cast<std::byte*>(block);
}

void BlockPool::reserve(std::int64_t bytes) {
  cuda_check(cudaFreeAsync(allocate(bytes), stream_.get()), "reserving memory");
  cuda_check(cudaStreamSynchronize(stream_.get()), "reserving memory");
}

// A block of at least `bytes`, and not of far more, out of these.
std::optional<BlockPool::Block> BlockPool::take_from(Blocks& blocks, std::int64_t bytes) {
  const auto found = blocks.lower_bound(bytes);
  if (found == blocks.end() || found->first > 2 * bytes + (1 << 20)) return {};
  return std::move(blocks.extract(found).mapped());
}

std::shared_ptr<std::byte> BlockPool::take(std::int64_t bytes, cuda::Stream stream) {
  bytes = std::max<std::int64_t>(bytes, 1);
  const bool captured = is_capturing(stream);
  std::optional<Block> block;
  {
    const std::lock_guard lock(mutex_);
    if (captured) block = take_from(free_captured_, bytes);
    if (!block) block = take_from(free_, bytes);
  }
  if (!block) block = {.data = allocate(bytes), .bytes = bytes, .order = std::make_shared<MemoryOrder>(device_)};
  block->captured = captured;
  const std::shared_ptr<std::byte> taken(block->data, GiveBack{shared_from_this(), *block});
  block->order->enter(stream);
  return taken;
}

void BlockPool::continue_on(const std::shared_ptr<void>& block, cuda::Stream stream) {
  std::get_deleter<GiveBack>(block)->block.order->continue_on(stream);
}

void BlockPool::GiveBack::operator()(std::byte* /*data*/) const {
  block.order->give_back();
  const std::lock_guard lock(pool->mutex_);
  (block.captured ? pool->free_captured_ : pool->free_).emplace(block.bytes, block);
}

void CountsPool::add_slab() {
  constexpr std::size_t kSlab = 256;
  slabs_.push_back(value_or_throw(make_pinned_buffer(kSlab * sizeof(cuda::HostCounts))));
  for (std::size_t i = 0; i < kSlab; ++i) free_.push_back(new (slabs_.back().as<cuda::HostCounts>() + i) cuda::HostCounts);
}

std::shared_ptr<cuda::HostCounts> CountsPool::take() {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) add_slab();
  cuda::HostCounts* const counts = free_.front();
  free_.pop_front();
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
    rows = {shape.local_experts, shape.expert_width};
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
  if (!expert_layout) views.local_ids = dense_view(own_order ? view.out_local_ids : view.local_ids, Dtype::int32, per_k);
  views.row_weights = dense_view(own_order ? view.out_weights : view.weights, Dtype::float32, expert_layout ? rows : per_k);
  if (layout != Layout::rank_slots) {
    views.source_rank = dense_view(own_order ? view.out_source_rank : view.source_rank, Dtype::int32, rows);
    views.source_token = dense_view(own_order ? view.out_source_token : view.source_token, Dtype::int32, rows);
  }
  if (expert_layout) views.source_k = dense_view(view.out_source_k, Dtype::int32, rows);
  views.expert_counts = list(view.expert_counts, shape.local_experts);
  if (layout == Layout::expert_major || shape.gather_map) views.expert_offsets = list(view.expert_offsets, shape.local_experts + 1);
  if (shape.gather_map) views.expert_rows = list(view.gather_map, map_rows);
  views.rank_counts = list(view.rank_counts, shape.arena.ranks);
  views.sent_counts = list(view.sent_counts, shape.arena.ranks);
  if (layout == Layout::expert_padded) views.ranges = dense_view(view.ranges, Dtype::int32, {shape.local_experts, shape.arena.ranks, 2});
  if (layout == Layout::rank_slots) views.present = dense_view(view.present, Dtype::uint8, rows);
  return views;
}

}  // namespace tokenyard::exchange_internal
