// The dispatch half of the collective exchange: pack, move, and in latency mode unpack.

#include <fmt/core.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "exchange/collective_transport.h"
#include "kernels/cpu/kernels.h"
#include "protocol/record.h"

namespace tokenyard::exchange_internal {
namespace {

using protocol::align_up;
using protocol::CallHeader;

constexpr std::int64_t kGrain = 8;

// The slot of the first row to each rank; those that follow ascend by one, token after token.
std::vector<std::int64_t> first_slots(const SendPlan& plan, std::span<const std::int64_t> counts) {
  std::vector<std::int64_t> first(counts.size(), -1);
  auto missing = std::count_if(counts.begin(), counts.end(), [](std::int64_t count) { return count > 0; });
  for (std::size_t i = 0; missing > 0; ++i) {
    std::int64_t& slot = first[plan.entries[i].rank];
    if (slot >= 0) continue;
    slot = plan.entries[i].slot;
    --missing;
  }
  return first;
}

}  // namespace

Expected<Landing> CollectiveTransport::exchange_rows(const RowsCall& call) {
  if (auto learned = learn_counts(call); !learned) return unexpected(learned.error());
  const Planes landing = landing_planes(call);
  auto moved = attempt(Phase::dispatch_rows, [&] {
    if (call.mode == Mode::latency) {
      exchange_packed(call, landing);
    } else {
      exchange_in_place(call, landing);
    }
  });
  if (!moved) return unexpected(moved.error());
  for (int peer = 0; peer < ranks_; ++peer) link_bytes_[peer] += sent_[peer] * (call.source->row_bytes() + call.source->scale_bytes());
  Landing result;
  result.rows = landing.rows.data;
  result.scales = landing.scales.data;
  result.records = call.known == nullptr ? landing.records.data : nullptr;
  result.count = received_;
  result.begin = starts(received_);
  for (int source = 0; call.mode == Mode::latency && source < ranks_; ++source) result.begin[source] = source * shape_.max_tokens_per_rank;
  const RowMemory& buffer = buffers_[board_->front()];
  auto lease = board_->lease({call.header.call, call.layout});
  result.lease = std::shared_ptr<void>(buffer.data.get(), [kept_alive = buffer.data, lease = std::move(lease)](void*) {});
  return result;
}

// How many rows go to and come from each rank.
Expected<void> CollectiveTransport::learn_counts(const RowsCall& call) {
  sent_.assign(call.plan->counts.begin(), call.plan->counts.begin() + ranks_);
  if (call.known != nullptr) {
    received_.resize(ranks_);
    std::adjacent_difference(call.known->source_begin.begin() + 1, call.known->source_begin.end(), received_.begin());
    return {};
  }
  if (call.mode == Mode::throughput) return {};  // exchange_counts() has told
  struct Message {
    CallHeader header;
    std::int64_t rows;
  };
  std::vector<Message> out(ranks_), in(ranks_);
  for (int peer = 0; peer < ranks_; ++peer) out[peer] = {call.header, sent_[peer]};
  const Counts one(ranks_, 1);
  auto told = attempt(Phase::dispatch_counts, [&] {
    all_to_all({reinterpret_cast<const std::byte*>(out.data()), one}, {reinterpret_cast<const std::byte*>(in.data()), one},
               sizeof(Message));
  });
  if (!told) return told;
  received_.resize(ranks_);
  std::vector<CallHeader> headers(ranks_);
  for (int peer = 0; peer < ranks_; ++peer) {
    received_[peer] = in[peer].rows;
    headers[peer] = in[peer].header;
  }
  return check_headers(call.header, headers);
}

CollectiveTransport::Planes CollectiveTransport::landing_planes(const RowsCall& call) const {
  std::byte* const data = buffers_[board_->front()].data.get();
  const std::int64_t rows = align_up(shape_.receive_rows * shape_.row_bytes, protocol::kCacheLine);
  const std::int64_t scales = align_up(shape_.receive_rows * shape_.scale_bytes, protocol::kCacheLine);
  return {.rows = {data, call.source->row_bytes()},
          .scales = {data + rows, call.source->scale_bytes()},
          .records = {data + rows + scales, shape_.record_bytes()}};
}

// Throughput mode: rows, scales and records each cross on their own, straight to where they stay.
void CollectiveTransport::exchange_in_place(const RowsCall& call, const Planes& landing) {
  const Counts out_counts = without_own(sent_);
  const std::int64_t rows = total(out_counts);
  const std::int64_t row_bytes = call.source->row_bytes();
  const std::int64_t scale_bytes = call.source->scale_bytes();
  const std::int64_t scales_at = rows * row_bytes;
  const std::int64_t records_at = align_up(scales_at + rows * scale_bytes, 16);
  std::byte* const out = out_.of(records_at + rows * shape_.record_bytes());
  const Planes packed{
      .rows = {out, row_bytes}, .scales = {out + scales_at, scale_bytes}, .records = {out + records_at, shape_.record_bytes()}};
  pack(call, packed, landing);
  all_to_all({packed.rows.data, out_counts}, {landing.rows.data, received_}, row_bytes);
  if (scale_bytes > 0) all_to_all({packed.scales.data, out_counts}, {landing.scales.data, received_}, scale_bytes);
  if (call.known == nullptr) all_to_all({packed.records.data, out_counts}, {landing.records.data, received_}, shape_.record_bytes());
}

// Latency mode: a small batch is bound by the number of messages, so all that belongs to a row crosses together.
void CollectiveTransport::exchange_packed(const RowsCall& call, const Planes& landing) {
  const Counts out_counts = without_own(sent_);
  const Counts in_counts = without_own(received_);
  const std::int64_t scales_at = call.source->row_bytes();
  const std::int64_t records_at = scales_at + align_up(call.source->scale_bytes(), 16);
  const std::int64_t bytes = records_at + (call.known == nullptr ? shape_.record_bytes() : 0);
  const auto planes = [&](std::byte* data) {
    return Planes{.rows = {data, bytes}, .scales = {data + scales_at, bytes}, .records = {data + records_at, bytes}};
  };
  const Planes packed = planes(out_.of(total(out_counts) * bytes));
  const Planes arrived = planes(in_.of(total(in_counts) * bytes));
  pack(call, packed, landing);
  all_to_all({packed.rows.data, out_counts}, {arrived.rows.data, in_counts}, bytes);
  unpack(call, arrived, landing);
}

// Every row is read once and written to all its places: packed for other ranks, landed for this one.
void CollectiveTransport::pack(const RowsCall& call, const Planes& packed, const Planes& landing) {
  const SendPlan& plan = *call.plan;
  const std::int64_t row_bytes = call.source->row_bytes();
  const std::int64_t scale_bytes = call.source->scale_bytes();
  const bool by_token = call.mode == Mode::latency;
  const bool stream = cpu::should_stream(static_cast<std::int64_t>(plan.entries.size()) * row_bytes);
  std::vector<std::int64_t> offset = starts(without_own(sent_));  // of an entry's index from its slot
  const std::vector<std::int64_t> first = first_slots(plan, sent_);
  for (int peer = 0; peer < ranks_; ++peer) offset[peer] -= first[peer];
  offset[rank_] = by_token ? rank_ * shape_.max_tokens_per_rank : 0;
  pool_.parallel_for(plan.num_tokens, kGrain, [&](std::int64_t begin, std::int64_t end, int) {
    std::vector<std::byte> scratch(call.source->scratch_bytes());
    std::vector<void*> targets;
    for (std::int64_t token = begin; token < end; ++token) {
      if (plan.entries_of(token).empty()) continue;
      const RowSource::Row from = call.source->at(token, scratch.data());
      targets.clear();
      for (std::int64_t at = plan.token_begin[token]; at < plan.token_begin[token + 1]; ++at) {
        const SendEntry& entry = plan.entries[at];
        const bool own = entry.rank == rank_;
        const Planes& to = own ? landing : packed;
        const std::int64_t index = offset[entry.rank] + entry.slot;
        const std::int64_t row = own && by_token ? offset[rank_] + token : index;
        targets.push_back(to.rows.at(row));
        if (scale_bytes > 0) std::memcpy(to.scales.at(row), from.scales, scale_bytes);
        if (call.known == nullptr) call.write_record(token, at, to.records.at(index));
      }
      cpu::copy_row_to_many(targets.data(), static_cast<int>(targets.size()), from.row, row_bytes, stream);
    }
    if (stream) cpu::stream_fence();
  });
}

// From the order of arrival to the slot of each (source rank, token).
void CollectiveTransport::unpack(const RowsCall& call, const Planes& arrived, const Planes& landing) {
  const std::int64_t scale_bytes = call.source->scale_bytes();
  const std::vector<std::int64_t> begin = starts(without_own(received_));
  const bool stream = cpu::should_stream(total(received_) * call.source->row_bytes());
  for (int step = 1; step < ranks_; ++step) {
    const int source = (rank_ + step) % ranks_;
    const std::int64_t first = source * shape_.max_tokens_per_rank;
    pool_.parallel_for(received_[source], kGrain, [&](std::int64_t from, std::int64_t to, int) {
      for (std::int64_t r = from; r < to; ++r) {
        const std::int64_t index = begin[source] + r;
        std::int64_t token = 0;
        if (call.known != nullptr) {
          token = call.known->source_token[call.known->source_begin[source] + r];
        } else {
          std::memcpy(landing.records.at(first + r), arrived.records.at(index), shape_.record_bytes());
          token = protocol::Record{arrived.records.at(index), call.plan->top_k}.source_token();
        }
        cpu::copy_row(landing.rows.at(first + token), arrived.rows.at(index), call.source->row_bytes(), stream);
        if (scale_bytes > 0) std::memcpy(landing.scales.at(first + token), arrived.scales.at(index), scale_bytes);
      }
      if (stream) cpu::stream_fence();
    });
  }
}

}  // namespace tokenyard::exchange_internal
