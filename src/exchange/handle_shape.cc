#include "exchange/handle_shape.h"

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

}  // namespace

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

HandleShape handle_shape(const protocol::ArenaShape& arena, const LayoutOptions& options, Layout layout, Mode mode, int top_k) {
  HandleShape shape{.arena = arena, .layout = layout, .mode = mode, .top_k = top_k, .local_experts = options.local_experts};
  shape.gather_map = options.gather_map;
  shape.rows = mode == Mode::latency ? arena.ranks * arena.max_tokens_per_rank : arena.receive_rows;
  shape.output_rows = shape.rows;
  if (layout == Layout::expert_padded) {
    shape.expert_width = options.expert_capacity == 0 ? arena.receive_rows : options.expert_capacity;
    shape.output_rows = options.local_experts * shape.expert_width;
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

}  // namespace tokenyard::exchange_internal
