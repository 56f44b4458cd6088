#include "exchange/memory_plan.h"

#include <algorithm>
#include <limits>

#include "core/usage.h"
#include "exchange/direct_arena.h"
#include "exchange/handle_shape.h"
#include "protocol/device_scratch.h"

namespace tokenyard {
namespace exchange_internal {
namespace {

constexpr std::int64_t kMaxBytes = std::int64_t{1} << 50;
constexpr int kMaxAlignment = 256;

std::int64_t checked_product(const char* what, std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product) || product > kMaxBytes) {
    usage_error("{} = {} x {} exceeds {} bytes; choose smaller sizes", what, a, b, kMaxBytes);
  }
  return product;
}

void check_range(const char* what, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) usage_error("{} = {} is out of range; choose {} to {}", what, value, low, high);
}

void check_groups(const std::vector<int>& groups, int ranks) {
  if (groups.empty()) return;
  if (static_cast<int>(groups.size()) != ranks) {
    usage_error("reduction_groups has {} entries for {} ranks; give the group of each rank, or none", groups.size(), ranks);
  }
  const int top = *std::max_element(groups.begin(), groups.end());
  for (int group = 0; group <= std::min(top, ranks); ++group) {
    if (std::find(groups.begin(), groups.end(), group) == groups.end()) {
      usage_error("reduction_groups names group {} but no rank is in group {}; number them from 0 without gaps", top, group);
    }
  }
  for (const int group : groups) check_range("reduction_groups", group, 0, ranks - 1);
}

}  // namespace

ExchangeOptions checked_options(const ExchangeOptions& options, int ranks) {
  ExchangeOptions checked = options;
  constexpr std::int64_t kMaxInt = std::numeric_limits<std::int32_t>::max();
  check_range("ranks", ranks, 1, 65535);
  check_range("max_tokens_per_rank", checked.max_tokens_per_rank, 1, kMaxInt);
  check_range("max_row_bytes", checked.max_row_bytes, 16, std::int64_t{1} << 30);
  if (checked.max_row_bytes % 16 != 0) {
    usage_error("max_row_bytes = {} is not a multiple of 16; choose {}", checked.max_row_bytes,
                protocol::align_up(checked.max_row_bytes, 16));
  }
  check_range("max_scale_bytes", checked.max_scale_bytes, 0, std::int64_t{1} << 24);
  check_range("top_k", checked.top_k, 1, 64);
  check_range("max_local_experts", checked.max_local_experts, 1, 65535);
  check_range("max_fanout", checked.max_fanout, 1, ranks);
  check_range("depth", checked.depth, 1, protocol::kMaxDepth);
  check_range("num_threads", checked.num_threads, 1, 1024);
  check_range("timeout_ms", checked.timeout_ms, 0, kMaxInt);
  check_range("max_expert_rows", checked.max_expert_rows, 0, kMaxInt);
  check_groups(checked.reduction_groups, ranks);
  if (checked.nccl_communicator != nullptr && checked.transport != Transport::nccl_window)
    usage_error("nccl_communicator is given, and transport {} uses none; use transport nccl_window", name(checked.transport));
  const std::int64_t bound = checked_product("ranks x max_tokens_per_rank", ranks, checked.max_tokens_per_rank);
  if (checked.receive_rows == 0) checked.receive_rows = bound;
  check_range("receive_rows", checked.receive_rows, 1, std::min(bound, kMaxInt));
  check_range("receive_rows x top_k", checked.receive_rows * checked.top_k, 1, kMaxInt);
  check_range("max_tokens_per_rank x top_k x max_fanout", checked.max_tokens_per_rank * checked.top_k * checked.max_fanout, 1, kMaxInt);
  const std::int64_t receive =
      checked_product("receive_rows x max_row_bytes", checked.receive_rows, checked.max_row_bytes + checked.max_scale_bytes);
  checked_product("depth x receive_rows x max_row_bytes", checked.depth, receive);
  checked_product("staging rows x max_row_bytes", shape_of(checked, ranks).staging_rows(), checked.max_row_bytes);
  checked_product("expert rows x max_row_bytes", expert_major_rows(checked), checked.max_row_bytes);
  return checked;
}

protocol::ArenaShape shape_of(const ExchangeOptions& checked, int ranks) {
  return {.ranks = ranks,
          .max_tokens_per_rank = checked.max_tokens_per_rank,
          .row_bytes = checked.max_row_bytes,
          .scale_bytes = checked.max_scale_bytes,
          .top_k = checked.top_k,
          .max_local_experts = checked.max_local_experts,
          .max_fanout = checked.max_fanout,
          .receive_rows = checked.receive_rows,
          .depth = checked.depth,
          .expert_rows = checked.expert_rows,
          .unfolded = checked.unfolded};
}

std::int64_t expert_major_rows(const ExchangeOptions& checked) {
  if (checked.max_expert_rows != 0) return checked.max_expert_rows;
  const std::int64_t rows = checked.receive_rows * checked.top_k + std::int64_t{checked.max_local_experts} * (kMaxAlignment - 1);
  return protocol::align_up(rows, kMaxAlignment);
}

}  // namespace exchange_internal

std::int64_t MemoryPlan::total() const {
  std::int64_t bytes = 0;
  for (const MemoryItem& item : items) bytes += item.bytes;
  return bytes;
}

MemoryPlan Exchange::memory_plan(const ExchangeOptions& options, int ranks) {
  using namespace exchange_internal;
  const ExchangeOptions checked = checked_options(options, ranks);
  const protocol::ArenaShape shape = shape_of(checked, ranks);
  const bool on_gpu = checked.device == Device::cuda;
  const protocol::ArenaLayout layout = on_gpu ? device_arena_layout(shape) : host_arena_layout(shape);
  const auto rows = checked.receive_rows;
  const std::int64_t k = checked.top_k;
  MemoryPlan plan;
  auto add = [&plan](const char* purpose, std::int64_t bytes, std::string formula) {
    plan.items.push_back({purpose, bytes, std::move(formula)});
  };
  add("receive", checked.depth * (layout.rows_bytes + layout.scales_bytes + layout.records_bytes),
      fmt::format("depth {} x receive_rows {} x (row {} + scale {} + metadata {})", checked.depth, rows, checked.max_row_bytes,
                  checked.max_scale_bytes, shape.record_bytes()));
  add("staging", layout.staging_bytes,
      checked.unfolded ? fmt::format("max_tokens_per_rank {} x top_k {} x max_fanout {} x row {}", checked.max_tokens_per_rank, k,
                                     checked.max_fanout, checked.max_row_bytes)
                       : fmt::format("max_tokens_per_rank {} x min(top_k {} x max_fanout {}, ranks {} - 1) x row {}",
                                     checked.max_tokens_per_rank, k, checked.max_fanout, ranks, checked.max_row_bytes));
  add("weights", layout.weights_in_bytes + layout.weights_back_bytes,
      fmt::format("(receive_rows {} + max_tokens_per_rank {} x {}) x top_k {} x 4", rows, checked.max_tokens_per_rank,
                  shape.partials_per_token(), k));
  if (checked.expert_rows)
    add("expert rows, pulled", layout.expert_rows_bytes, fmt::format("receive_rows {} x row {}", rows, checked.max_row_bytes));
  add("counts", 2 * shape.ranks * layout.counts_bytes,
      fmt::format("2 x ranks {0} x (ranks {0} + ranks {0} x max_local_experts {1}) x {2}", ranks, checked.max_local_experts,
                  on_gpu ? 8 : 4));
  const std::int64_t flags = layout.total - plan.total();
  const std::string arrivals = on_gpu ? fmt::format(" + max_tokens_per_rank {} x 8", checked.max_tokens_per_rank) : "";
  add("flags and alignment", flags, fmt::format("ranks {} x ({}{}) and page rounding", ranks, layout.mailbox_bytes, arrivals));
  add("expert layouts, when first used", checked.depth * expert_major_rows(checked) * (checked.max_row_bytes + checked.max_scale_bytes),
      fmt::format("depth {} x {} rows x (row {} + scale {}) at most; max_expert_rows limits it", checked.depth, expert_major_rows(checked),
                  checked.max_row_bytes, checked.max_scale_bytes));
  if (on_gpu) {
    add("scratch", protocol::device_scratch(shape).bytes(),
        fmt::format("row numbers of max_tokens_per_rank {} x ranks {} x 4, counts, and prefix sums over chunks of {} tokens and of {} rows",
                    checked.max_tokens_per_rank, ranks, protocol::kPlanChunk, protocol::layout_chunk_rows(shape)));
    const LayoutOptions options_of_layout{.sizing = Sizing::capacity,
                                          .gather_map = true,
                                          .local_experts = checked.max_local_experts,
                                          .max_expert_rows = checked.max_expert_rows};
    add("handle, each", handle_bytes(handle_shape(shape, options_of_layout, Layout::token_major, checked.mode, checked.top_k)),
        "token_major with its gather map; device memory, used again when a handle goes");
    return plan;
  }
  const std::int64_t entries = checked.max_tokens_per_rank * std::min<std::int64_t>(ranks, std::int64_t{k} * checked.max_fanout);
  add("handle, each", entries * (static_cast<std::int64_t>(sizeof(SendEntry)) + 4 * k) + rows * (8 + 8 * k) * 2 + shape.count_words() * 4,
      fmt::format("{} entries x ({} + 4 x top_k {}) + receive_rows {} x (8 + 8 x top_k) x 2, at most", entries, sizeof(SendEntry), k,
                  rows));
  return plan;
}

}  // namespace tokenyard
