// The dispatch half of the direct exchange: count, place, move, publish.

#include <algorithm>
#include <cstring>

#include "exchange/direct_transport.h"
#include "kernels/cpu/kernels.h"
#include "protocol/flags.h"

namespace tokenyard::exchange_internal {

using protocol::CallHeader;
using protocol::load_acquire;
using protocol::MessageKind;

Expected<void> DirectTransport::exchange_counts(const CallHeader& header, std::span<const std::int32_t> mine,
                                                std::vector<std::int32_t>& all) {
  const int ranks = arena_->ranks();
  for (int i = 0; i < ranks; ++i) {
    const int peer = (arena_->rank() + i) % ranks;
    std::copy(mine.begin(), mine.end(), arena_->counts(peer, arena_->rank(), header.call));
    send(peer, MessageKind::counts, header, {});
  }
  if (auto arrived = await(Phase::dispatch_counts, MessageKind::counts, header); !arrived) return arrived;
  all.resize(ranks * mine.size());
  for (int source = 0; source < ranks; ++source) {
    std::copy_n(arena_->counts(arena_->rank(), source, header.call), mine.size(),
                all.begin() + static_cast<std::ptrdiff_t>(source * mine.size()));
  }
  return {};
}

Expected<void> DirectTransport::await_grants(const CallHeader& header) {
  const std::size_t word = dispatch_epoch_ % protocol::kMaxDepth;
  return wait_.for_all(Phase::dispatch_credit, header, [&](int peer) {
    return protocol::is_grant_for(load_acquire(arena_->mailbox(arena_->rank(), peer).grants[word]), dispatch_epoch_);
  });
}

Expected<Landing> DirectTransport::exchange_rows(const RowsCall& call) {
  if (auto granted = await_grants(call.header); !granted) return unexpected(granted.error());
  const int ranks = arena_->ranks();
  std::vector<Target> targets;
  targets.reserve(ranks);
  for (int peer = 0; peer < ranks; ++peer) {
    const int buffer =
        protocol::granted_buffer(load_acquire(arena_->mailbox(arena_->rank(), peer).grants[dispatch_epoch_ % protocol::kMaxDepth]));
    targets.push_back({arena_->rows(peer, buffer), arena_->scales(peer, buffer), arena_->records(peer, buffer)});
  }
  move_rows(call, targets);
  for (int i = 0; i < ranks; ++i) {
    const int peer = (arena_->rank() + i) % ranks;
    const std::int64_t rows = call.plan->counts[peer];
    link_bytes_[peer] += rows * (call.source->row_bytes() + call.source->scale_bytes());
    send(peer, MessageKind::rows, call.header, {.count = rows});
  }
  if (auto arrived = await(Phase::dispatch_rows, MessageKind::rows, call.header); !arrived) return unexpected(arrived.error());
  ++dispatch_epoch_;
  return landing_of(call);
}

void DirectTransport::move_rows(const RowsCall& call, std::span<const Target> targets) {
  const SendPlan& plan = *call.plan;
  const StoreChoice::Stores stores(store_choice_, static_cast<std::int64_t>(plan.entries.size()) * call.source->row_bytes());
  constexpr std::int64_t kGrain = 8;
  pool_.parallel_for(plan.num_tokens, kGrain, [&](std::int64_t begin, std::int64_t end, int) {
    std::vector<std::byte> scratch(call.source->scratch_bytes());
    for (std::int64_t token = begin; token < end; ++token) move_token(call, targets, token, scratch.data(), stores);
    if (stores.stream_to_peers()) cpu::stream_fence();
  });
}

void DirectTransport::move_token(const RowsCall& call, std::span<const Target> targets, std::int64_t token, std::byte* scratch,
                                 const StoreChoice::Stores& stores) const {
  const SendPlan& plan = *call.plan;
  const std::span<const SendEntry> entries = plan.entries_of(token);
  if (entries.empty()) return;
  const protocol::ArenaShape& shape = arena_->shape();
  const RowSource::Row from = call.source->at(token, scratch);
  const std::int64_t row_bytes = call.source->row_bytes();
  const std::int64_t scale_bytes = call.source->scale_bytes();
  const std::int64_t first = call.mode == Mode::latency ? arena_->rank() * shape.max_tokens_per_rank : 0;
  constexpr int kAtOnce = 16;
  void* copies[kAtOnce];
  int waiting = 0;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const SendEntry& entry = entries[i];
    const Target& target = targets[entry.rank];
    const std::int64_t row = first + (call.mode == Mode::latency ? token : entry.slot);
    std::byte* const to = target.rows + row * row_bytes;
    if (entry.rank == arena_->rank() && stores.stream_to_self() != stores.stream_to_peers()) {
      cpu::copy_row(to, from.row, row_bytes, stores.stream_to_self());
    } else {
      copies[waiting++] = to;
    }
    if (scale_bytes != 0) std::memcpy(target.scales + row * scale_bytes, from.scales, scale_bytes);
    if (call.known == nullptr) {
      const std::int64_t at = plan.token_begin[token] + static_cast<std::int64_t>(i);
      call.write_record(token, at, target.records + (first + entry.slot) * shape.record_bytes());
    }
    if (waiting == kAtOnce || i + 1 == entries.size()) {
      cpu::copy_row_to_many(copies, waiting, from.row, row_bytes, stores.stream_to_peers());
      waiting = 0;
    }
  }
}

Landing DirectTransport::landing_of(const RowsCall& call) {
  const int rank = arena_->rank();
  const int ranks = arena_->ranks();
  const int buffer = grants_->board->front();
  Landing landing;
  landing.rows = arena_->rows(rank, buffer);
  landing.scales = arena_->scales(rank, buffer);
  landing.records = call.known == nullptr ? arena_->records(rank, buffer) : nullptr;
  std::int64_t begin = 0;
  for (int source = 0; source < ranks; ++source) {
    const std::int64_t count = arena_->message(rank, source, MessageKind::rows, call.header.call).count;
    landing.begin.push_back(call.mode == Mode::latency ? source * arena_->shape().max_tokens_per_rank : begin);
    landing.count.push_back(count);
    begin += count;
  }
  landing.lease = grants_->board->lease({call.header.call, call.layout});
  return landing;
}

}  // namespace tokenyard::exchange_internal
