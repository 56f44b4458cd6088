#include "bench_plain.h"

#include <algorithm>
#include <numeric>

#include "kernels/cpu/kernels.h"
#include "placement/table.h"
#include "protocol/record.h"

namespace tokenyard::cli {
namespace {

using exchange_internal::read_weights;
using exchange_internal::RowMemory;
using exchange_internal::SendEntry;

constexpr std::int64_t kGrain = 8;

}  // namespace

PlainExchange::PlainExchange(const World& world, const Placement& placement, const Shape& shape, ThreadPool& pool)
    : collectives_(Collectives::create(world, {.transport = Transport::mpi, .timeout_ms = shape.timeout_ms})),
      placement_(placement),
      shape_(shape),
      pool_(pool),
      rank_(world.rank()),
      ranks_(world.size()) {
  arena_.ranks = ranks_;
  arena_.max_local_experts = std::max(1, placement.max_local_experts());
  arena_.max_fanout = placement.max_fanout();
  const std::int64_t rows = ranks_ * shape.max_tokens;
  for (RowMemory* memory : {&packed_, &arrived_, &rows_}) *memory = exchange_internal::allocate_rows(rows * shape.row_bytes);
}

std::int64_t PlainExchange::total(const Counts& counts) { return std::accumulate(counts.begin(), counts.end(), std::int64_t{0}); }

PlainExchange::Counts PlainExchange::starts(const Counts& counts) {
  Counts begin(counts.size());
  std::exclusive_scan(counts.begin(), counts.end(), begin.begin(), std::int64_t{0});
  return begin;
}

void PlainExchange::exchange(const RowMemory& in, const Counts& send, const RowMemory& out, const Counts& receive, std::int64_t row_bytes) {
  collectives_->all_to_all_v({in.data.get(), Dtype::uint8, {total(send), row_bytes}}, send,
                             {out.data.get(), Dtype::uint8, {total(receive), row_bytes}}, receive);
}

void PlainExchange::dispatch(const DispatchInput& input) {
  const int top_k = static_cast<int>(input.topk_ids.shape[1]);
  if (arena_.top_k != top_k || !packed_records_.data) {
    arena_.top_k = top_k;
    record_bytes_ = arena_.record_bytes();
    const std::int64_t bytes = ranks_ * shape_.max_tokens * record_bytes_;
    for (RowMemory* memory : {&packed_records_, &arrived_records_}) *memory = exchange_internal::allocate_rows(bytes);
  }
  plan_ = exchange_internal::make_send_plan({.topk_ids = input.topk_ids, .top_k = top_k, .rank = rank_}, placement_.table().view(), arena_);
  sent_.assign(plan_.counts.begin(), plan_.counts.begin() + ranks_);
  received_.assign(ranks_, 0);
  const Counts one(ranks_, 1);
  collectives_->all_to_all_v({sent_.data(), Dtype::int64, {ranks_, 1}}, one, {received_.data(), Dtype::int64, {ranks_, 1}}, one);
  pack(input);
  exchange(packed_, sent_, arrived_, received_, shape_.row_bytes);
  exchange(packed_records_, sent_, arrived_records_, received_, record_bytes_);
  const bool stream = cpu::should_stream(num_rows() * shape_.row_bytes);
  for_each_arrived(
      [&](std::int64_t arrived, std::int64_t slot) { cpu::copy_row(at(rows_, slot), at(arrived_, arrived), shape_.row_bytes, stream); });
  unpack_records();
}

void PlainExchange::pack(const DispatchInput& input) {
  const Counts begin = starts(sent_);
  const bool stream = cpu::should_stream(static_cast<std::int64_t>(plan_.entries.size()) * shape_.row_bytes);
  pool_.parallel_for(plan_.num_tokens, kGrain, [&](std::int64_t first, std::int64_t last, int) {
    std::vector<void*> targets;
    for (std::int64_t token = first; token < last; ++token) {
      targets.clear();
      for (std::int64_t entry = plan_.token_begin[token]; entry < plan_.token_begin[token + 1]; ++entry) {
        const std::int64_t row = begin[plan_.entries[entry].rank] + plan_.entries[entry].slot;
        targets.push_back(at(packed_, row));
        const protocol::Record to{record(packed_records_, row), plan_.top_k};
        to.source_token() = static_cast<std::int32_t>(token);
        std::copy_n(&plan_.local_ids[entry * plan_.top_k], plan_.top_k, to.local_ids());
        read_weights(input.topk_weights, token, std::span(to.weights(), plan_.top_k));
      }
      cpu::copy_row_to_many(targets.data(), static_cast<int>(targets.size()), input.rows.row(token), shape_.row_bytes, stream);
    }
    if (stream) cpu::stream_fence();
  });
}

template <class Fn>
void PlainExchange::for_each_arrived(Fn&& fn) {
  const Counts begin = starts(received_);
  for (int source = 0; source < ranks_; ++source) {
    pool_.parallel_for(received_[source], kGrain, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t r = begin[source] + first; r < begin[source] + last; ++r) {
        const std::int32_t token = protocol::Record{record(arrived_records_, r), plan_.top_k}.source_token();
        fn(r, shape_.layout == Layout::token_major ? r : source * shape_.max_tokens + token);
      }
      cpu::stream_fence();
    });
  }
}

void PlainExchange::unpack_records() {
  const int k = plan_.top_k;
  source_token_.resize(num_rows());
  local_ids_.resize(num_rows() * k);
  weights_.resize(num_rows() * k);
  for (std::int64_t row = 0; row < num_rows(); ++row) {
    const protocol::Record from{record(arrived_records_, row), k};
    source_token_[row] = from.source_token();
    std::copy_n(from.local_ids(), k, &local_ids_[row * k]);
    std::copy_n(from.weights(), k, &weights_[row * k]);
  }
}

void PlainExchange::combine(const std::byte* y, Dtype dtype, const TensorView& out) {
  const bool stream = cpu::should_stream(num_rows() * shape_.row_bytes);
  for_each_arrived([&](std::int64_t arrived, std::int64_t slot) {
    cpu::copy_row(at(packed_, arrived), y + slot * shape_.row_bytes, shape_.row_bytes, stream);
  });
  exchange(packed_, received_, arrived_, sent_, shape_.row_bytes);
  const Counts begin = starts(sent_);
  const bool stream_out = cpu::should_stream(plan_.num_tokens * shape_.row_bytes);
  pool_.parallel_for(plan_.num_tokens, kGrain, [&](std::int64_t first, std::int64_t last, int) {
    std::vector<const void*> partials;
    for (std::int64_t token = first; token < last; ++token) {
      partials.clear();
      for (const SendEntry& entry : plan_.entries_of(token)) partials.push_back(at(arrived_, begin[entry.rank] + entry.slot));
      cpu::reduce({.partials = partials.data(),
                   .count = static_cast<int>(partials.size()),
                   .dtype = dtype,
                   .out_dtype = out.dtype,
                   .elements = out.shape[1],
                   .out = out.row(token),
                   .stream = stream_out});
    }
    if (stream_out) cpu::stream_fence();
  });
}

}  // namespace tokenyard::cli
