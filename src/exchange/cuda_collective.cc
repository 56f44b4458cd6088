#include "exchange/cuda_collective.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <numeric>

#include "core/usage.h"
#include "exchange/cuda_views.h"
#include "exchange/exchange_engine.h"
#include "memory/cuda_handle.h"

namespace tokenyard::exchange_internal {
namespace {

struct CollectiveHandle final : HandleFacts {
  int top_k() const override { return k; }
  std::int64_t num_tokens() const override { return tokens; }
  std::int64_t num_token_rows() const override { return shape[0]; }
  std::int64_t num_rows() const override { return shape[0]; }
  const std::vector<std::int64_t>& rows_shape() const override { return shape; }
  std::span<const std::int64_t> dropped() const override { return none_dropped; }
  ReceivedViews views() const override { return tensors; }

  int k = 1;
  std::int64_t tokens = 0;
  std::vector<std::int64_t> shape;         // {N}
  std::vector<std::int64_t> none_dropped;  // [L]
  ReceivedViews tensors;
};

constexpr std::int64_t record_bytes(int top_k) { return 8 + 8 * static_cast<std::int64_t>(top_k); }

bool is_on_16_bytes(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

// Rows that kernels read and NCCL sends 16 bytes at a time.
void check_rows(const char* what, const ConstTensorView& rows) {
  check_memory(what, rows);
  const std::int64_t element = size_of(rows.dtype);
  const bool fits = rows.ndim == 2 && rows.rows_contiguous() && rows.shape[1] * element % 16 == 0 && is_on_16_bytes(rows.data) &&
                    rows.strides[0] * element % 16 == 0;
  if (!fits)
    usage_error("{} is {}; the collective exchange takes [T,H] whose rows begin and end at multiples of 16 bytes", what, describe(rows));
}

void check_summable(const char* what, Dtype dtype) {
  if (dtype == Dtype::float32 || dtype == Dtype::bfloat16 || dtype == Dtype::float16) return;
  usage_error("{} is {}; on GPUs combine takes float32, bfloat16 or float16", what, name(dtype));
}

}  // namespace

CudaCollectiveExchange::CudaCollectiveExchange(const World& world, const Placement& placement, const ExchangeOptions& options)
    : world_(world),
      rank_(world.rank()),
      ranks_(world.size()),
      device_(options.device_index),
      placement_(placement),
      options_(options),
      collectives_(DeviceCollectives::create(world, {.device_index = options.device_index,
                                                     .transport = Transport::nccl,
                                                     .launch_here = true,
                                                     .timeout_ms = options.timeout_ms > 0 ? options.timeout_ms : world.timeout_ms()})) {
  if (placement.ranks() != ranks_) usage_error("the placement is for {} ranks, the world has {}", placement.ranks(), ranks_);
  if (device_ < 0) cuda_check(cudaGetDevice(&device_), "cudaGetDevice");
  const CudaDeviceScope scope(device_);
  cuda::preload_kernels();
  allocate_plan();
  allocate_rows();
  cuda_check(cudaDeviceSynchronize(), "preparing the collective exchange");
  world_.barrier();  // nobody waits in a kernel while another rank still allocates
}

void CudaCollectiveExchange::allocate_plan() {
  const std::int64_t tokens = options_.max_tokens_per_rank;
  const std::int64_t chunks = std::max<std::int64_t>(1, (tokens + cuda::kCollectiveChunk - 1) / cuda::kCollectiveChunk);
  plan_ = {.rank = rank_, .ranks = ranks_, .words = 1 + placement_.max_local_experts()};
  plan_.slots = allocate<std::int32_t>(tokens * ranks_);
  plan_.chunk_begin = allocate<std::int32_t>(chunks * ranks_);
  plan_.counts = allocate<std::int32_t>(ranks_ * plan_.words_per_rank());
  plan_.sent_begin = allocate<std::int32_t>(ranks_);
  plan_.receive_begin = allocate<std::int32_t>(ranks_ + 1);
  plan_.ticket = allocate<std::uint32_t>(1);
  cuda_check(cudaMemset(plan_.counts, 0, static_cast<std::size_t>(ranks_ * plan_.words_per_rank()) * 4), "clearing counts");
  cuda_check(cudaMemset(plan_.ticket, 0, 4), "clearing a ticket");
  pinned_ = value_or_throw(make_pinned_buffer(sizeof(cuda::CollectiveCounts) + 8 * static_cast<std::size_t>(ranks_)));
  const placement_internal::Table& table = placement_.table();
  table_ = table.view();
  const auto upload = [&](const std::vector<std::uint32_t>& from) {
    auto* const to = allocate<std::uint32_t>(std::ssize(from));
    cuda_check(cudaMemcpy(to, from.data(), from.size() * 4, cudaMemcpyHostToDevice), "copying a placement's table");
    return to;
  };
  table_.instances = upload(table.instances);
  table_.share_ends = upload(table.share_ends);
}

void CudaCollectiveExchange::allocate_rows() {
  const std::int64_t tokens = options_.max_tokens_per_rank;
  const std::int64_t most_ranks = std::min<std::int64_t>(std::int64_t{options_.top_k} * placement_.max_fanout(), ranks_ - 1);
  const auto tables = [&](std::int64_t rows) {
    return cuda::CollectiveTables{.rows = allocate<std::byte>(rows * options_.max_row_bytes),
                                  .scales = allocate<std::byte>(rows * options_.max_scale_bytes),
                                  .records = allocate<std::byte>(rows * record_bytes(options_.top_k))};
  };
  const std::int64_t rows = tokens * ranks_;
  packed_ = tables(tokens * most_ranks);
  landed_ = tables(rows);
  metadata_ = {.source_rank = allocate<std::int32_t>(rows),
               .source_token = allocate<std::int32_t>(rows),
               .local_ids = allocate<std::int32_t>(rows * options_.top_k),
               .weights = allocate<float>(rows * options_.top_k),
               .expert_counts = allocate<std::int32_t>(placement_.max_local_experts()),
               .rank_counts = allocate<std::int32_t>(ranks_),
               .sent_counts = allocate<std::int32_t>(ranks_)};
}

void CudaCollectiveExchange::check_input(const DispatchInput& input) const {
  check_rows("rows", input.rows);
  const std::int64_t tokens = input.rows.shape[0];
  const std::int64_t row_bytes = input.rows.shape[1] * size_of(input.rows.dtype);
  const std::int64_t scale_bytes = input.scales ? input.scales.shape[1] * size_of(input.scales.dtype) : 0;
  if (tokens > options_.max_tokens_per_rank || row_bytes > options_.max_row_bytes || scale_bytes > options_.max_scale_bytes) {
    usage_error("rows are {} with {} bytes of scales each; this exchange is for {} tokens of {} + {} bytes", describe(input.rows),
                scale_bytes, options_.max_tokens_per_rank, options_.max_row_bytes, options_.max_scale_bytes);
  }
  const ConstTensorView& ids = input.topk_ids;
  const bool known = ids.dtype == Dtype::int64 || ids.dtype == Dtype::int32;
  if (!known || ids.ndim < 1 || ids.shape[0] != tokens || top_k_of(ids) > options_.top_k) {
    usage_error("topk_ids are {}; they must be int64 or int32 [{},K] with K up to {}", describe(ids), tokens, options_.top_k);
  }
  check_memory("topk_ids", ids);
  check_memory("topk_weights", input.topk_weights);
  check_memory("scales", input.scales);
}

cuda::RoutingArgs CudaCollectiveExchange::routing_args(const DispatchInput& input) const {
  cuda::RoutingArgs args;
  args.ids = matrix(input.topk_ids);
  args.wide_ids = input.topk_ids.dtype == Dtype::int64;
  if (input.topk_weights) args.weights = matrix(input.topk_weights);
  args.num_tokens = static_cast<std::int32_t>(input.rows.shape[0]);
  args.top_k = top_k_of(input.topk_ids);
  args.table = table_;
  return args;
}

cuda::SourceArgs CudaCollectiveExchange::source_args(const DispatchInput& input) const {
  const ConstTensorView& rows = input.rows;
  cuda::SourceArgs args;
  args.rows = static_cast<const std::byte*>(rows.data);
  args.row_stride = rows.strides[0] * size_of(rows.dtype);
  args.row_bytes = rows.shape[1] * size_of(rows.dtype);
  if (!input.scales) return args;
  args.scales = matrix(input.scales);
  args.scale_columns = static_cast<std::int32_t>(input.scales.shape[1]);
  args.scale_element = static_cast<std::int32_t>(size_of(input.scales.dtype));
  return args;
}

std::int64_t CudaCollectiveExchange::total(const Counts& counts) { return std::accumulate(counts.begin(), counts.end(), std::int64_t{0}); }

CudaCollectiveExchange::Counts CudaCollectiveExchange::without_own(Counts counts) const {
  counts[rank_] = 0;
  return counts;
}

Received CudaCollectiveExchange::dispatch(const DispatchInput& input, void* stream) {
  const CudaDeviceScope scope(device_);
  check_input(input);
  const auto on = static_cast<cudaStream_t>(stream);
  const cuda::RoutingArgs routing = routing_args(input);
  const cuda::SourceArgs source = source_args(input);
  ++call_;
  tokens_ = input.rows.shape[0];
  cuda::launch_collective_plan({.plan = plan_, .routing = routing}, on);
  gather_counts(stream);
  cuda::launch_collective_pack({.plan = plan_,
                                .routing = routing,
                                .source = source,
                                .call = call_,
                                .host = pinned_.as<cuda::CollectiveCounts>(),
                                .packed = packed_,
                                .received = landed_},
                               on);
  cuda_check(cudaGetLastError(), "enqueueing a dispatch");
  await_counts();
  exchange_rows(source, routing.top_k, stream);
  land(routing.top_k, on);
  return received(input, routing.top_k, stream);
}

void CudaCollectiveExchange::gather_counts(void* stream) {
  const std::int64_t words = plan_.words_per_rank();
  collectives_->all_gather_v({plan_.mine(), Dtype::int32, {1, words}}, Counts(ranks_, 1), {plan_.counts, Dtype::int32, {ranks_, words}},
                             stream);
}

// The one wait of the host.
void CudaCollectiveExchange::await_counts() {
  auto& told = *pinned_.as<cuda::CollectiveCounts>();
  const volatile std::uint64_t& call = told.call;
  collectives_->wait_until([&] { return call == call_; });
  std::atomic_thread_fence(std::memory_order_acquire);
  sent_.assign(told.rows(), told.rows() + ranks_);
  received_.assign(told.rows() + ranks_, told.rows() + 2 * ranks_);
}

// This rank's own rows have landed already: nothing of them is sent.
void CudaCollectiveExchange::exchange_rows(const cuda::SourceArgs& source, int top_k, void* stream) {
  const Counts away = without_own(sent_);
  const auto table = [&](std::byte* from, std::byte* to, std::int64_t bytes) {
    return AllToAllRows{.in = {from, Dtype::uint8, {total(away), bytes}},
                        .send_counts = away,
                        .out = {to, Dtype::uint8, {total(received_), bytes}},
                        .receive_counts = received_};
  };
  const std::array<AllToAllRows, 3> tables = {table(packed_.rows, landed_.rows, source.row_bytes),
                                              table(packed_.records, landed_.records, record_bytes(top_k)),
                                              table(packed_.scales, landed_.scales, source.scale_bytes())};
  collectives_->all_to_all_v(std::span(tables).first(source.scale_bytes() > 0 ? 3 : 2), stream);
}

void CudaCollectiveExchange::land(int top_k, cuda::Stream stream) {
  cuda::launch_collective_land({.plan = plan_,
                                .records = landed_.records,
                                .num_rows = static_cast<std::int32_t>(total(received_)),
                                .top_k = top_k,
                                .local_experts = static_cast<std::int32_t>(placement_.local_experts(rank_).size()),
                                .source_rank = metadata_.source_rank,
                                .source_token = metadata_.source_token,
                                .local_ids = metadata_.local_ids,
                                .weights = metadata_.weights,
                                .expert_counts = metadata_.expert_counts,
                                .rank_counts = metadata_.rank_counts,
                                .sent_counts = metadata_.sent_counts},
                               stream);
  cuda_check(cudaGetLastError(), "enqueueing the metadata of a dispatch");
}

Received CudaCollectiveExchange::received(const DispatchInput& input, int top_k, void* stream) const {
  const std::int64_t rows = total(received_);
  const std::int64_t experts = std::ssize(placement_.local_experts(rank_));
  auto handle = std::make_shared<CollectiveHandle>();
  handle->call = call_;
  handle->placement_hash = placement_.hash();
  handle->stream = stream;
  handle->k = top_k;
  handle->tokens = tokens_;
  handle->shape = {rows};
  handle->none_dropped.assign(static_cast<std::size_t>(experts), 0);
  ReceivedViews& views = handle->tensors;
  views.local_ids = {metadata_.local_ids, Dtype::int32, {rows, top_k}};
  views.row_weights = {metadata_.weights, Dtype::float32, {rows, top_k}};
  views.source_rank = {metadata_.source_rank, Dtype::int32, {rows}};
  views.source_token = {metadata_.source_token, Dtype::int32, {rows}};
  views.expert_counts = {metadata_.expert_counts, Dtype::int32, {experts}};
  views.rank_counts = {metadata_.rank_counts, Dtype::int32, {ranks_}};
  views.sent_counts = {metadata_.sent_counts, Dtype::int32, {ranks_}};
  auto state = std::make_shared<ReceivedState>();
  state->rows = {landed_.rows, input.rows.dtype, {rows, input.rows.shape[1]}};
  if (input.scales) state->scales = {landed_.scales, input.scales.dtype, {rows, input.scales.shape[1]}};
  state->handle = Handle(std::move(handle));
  return Received(std::move(state));
}

void CudaCollectiveExchange::combine(const ConstTensorView& y, const TensorView& out, void* stream) {
  const CudaDeviceScope scope(device_);
  if (sent_.empty()) usage_error("combine before any dispatch; its rows come back along the last one");
  check_rows("y", y);
  check_rows("out", out);
  check_summable("y", y.dtype);
  check_summable("out", out.dtype);
  const std::int64_t row_bytes = y.shape[1] * size_of(y.dtype);
  if (y.shape[0] != total(received_) || row_bytes > options_.max_row_bytes || out.shape[0] != tokens_ || out.shape[1] != y.shape[1]) {
    usage_error("y is {} and out {}; the last dispatch received {} rows, of {} tokens here, and rows have up to {} bytes", describe(y),
                describe(out), total(received_), tokens_, options_.max_row_bytes);
  }
  // Rows go back in the order in which they came, so y leaves from where it is; what comes back lies as it was packed.
  const Counts back = without_own(sent_);
  const AllToAllRows table{.in = {y.data, Dtype::uint8, {total(received_), row_bytes}},
                           .send_counts = received_,
                           .out = {packed_.rows, Dtype::uint8, {total(back), row_bytes}},
                           .receive_counts = back};
  if (y.shape[0] > 1 && y.strides[0] != y.shape[1]) usage_error("y is {} with gaps between rows; NCCL takes dense rows", describe(y));
  collectives_->all_to_all_v(std::span(&table, 1), stream);
  std::int64_t own_begin = 0;
  for (int source = 0; source < rank_; ++source) own_begin += received_[source];
  cuda::launch_collective_sum({.plan = plan_,
                               .num_tokens = static_cast<std::int32_t>(tokens_),
                               .returned = packed_.rows,
                               .own = static_cast<const std::byte*>(y.data) + own_begin * row_bytes,
                               .row_bytes = static_cast<std::int32_t>(row_bytes),
                               .dtype = y.dtype,
                               .out = static_cast<std::byte*>(out.data),
                               .out_pitch = out.strides[0] * size_of(out.dtype),
                               .out_dtype = out.dtype},
                              static_cast<cudaStream_t>(stream));
  cuda_check(cudaGetLastError(), "enqueueing a combine");
}

}  // namespace tokenyard::exchange_internal
