#include "exchange/collective_transport.h"

#include <fmt/core.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/log.h"
#include "exchange/peer_wait.h"

namespace tokenyard::exchange_internal {

using protocol::align_up;
using protocol::CallHeader;

Expected<std::unique_ptr<RowTransport>> CollectiveTransport::create(const World& world, const ExchangeOptions& options,
                                                                    const protocol::ArenaShape& shape, ThreadPool& pool) {
  // A world of its own: it connects anew from the thread that runs the calls, while the caller may use `world`.
  auto transport = std::make_unique<CollectiveTransport>(*world.split(0, world.rank()), options, shape, pool);
  if (auto connected = transport->connect(); !connected) return unexpected(connected.error());
  log_info("exchange: {} ranks, over {} collectives", world.size(), name(transport->transport()));
  return transport;
}

CollectiveTransport::CollectiveTransport(World world, const ExchangeOptions& options, const protocol::ArenaShape& shape, ThreadPool& pool)
    : world_(std::move(world)),
      rank_(world_.rank()),
      ranks_(world_.size()),
      options_{.transport = options.transport, .timeout_ms = options.timeout_ms},
      shape_(shape),
      pool_(pool),
      board_(std::make_shared<LeaseBoard>(options.depth, [](int) {})),
      link_bytes_(ranks_, 0) {
  const std::int64_t row_bytes = shape_.row_bytes + align_up(shape_.scale_bytes, 16) + shape_.record_bytes();
  for (int i = 0; i < options.depth; ++i) buffers_.push_back(allocate_rows(shape_.receive_rows * row_bytes + 2 * protocol::kCacheLine));
}

Expected<void> CollectiveTransport::connect() {
  try {
    auto fresh = Collectives::create(world_, options_);
    const std::lock_guard lock(mutex_);
    collectives_ = std::move(fresh);
    if (cancelled_) collectives_->cancel();
  } catch (const TransportError& error) {
    return unexpected(error.failure());
  }
  must_connect_ = false;
  return {};
}

void CollectiveTransport::cancel() {
  const std::lock_guard lock(mutex_);
  cancelled_ = true;
  collectives_->cancel();
}

void CollectiveTransport::all_to_all(Side in, Side out, std::int64_t row_bytes) {
  collectives_->all_to_all_v({in.data, Dtype::uint8, {total(in.counts), row_bytes}}, in.counts,
                             {const_cast<std::byte*>(out.data), Dtype::uint8, {total(out.counts), row_bytes}}, out.counts);
}

std::int64_t CollectiveTransport::total(const Counts& counts) { return std::accumulate(counts.begin(), counts.end(), std::int64_t{0}); }

CollectiveTransport::Counts CollectiveTransport::starts(const Counts& counts) {
  Counts begin(counts.size());
  std::exclusive_scan(counts.begin(), counts.end(), begin.begin(), std::int64_t{0});
  return begin;
}

CollectiveTransport::Counts CollectiveTransport::without_own(Counts counts) const {
  counts[rank_] = 0;
  return counts;
}

std::byte* CollectiveTransport::Scratch::of(std::int64_t bytes) {
  // Some room to grow, so that loads that vary a little settle.
  if (memory_.bytes < bytes) memory_ = allocate_rows(bytes + bytes / 8);
  return memory_.data.get();
}

Expected<void> CollectiveTransport::begin_call(const CallHeader&) {
  if (!must_connect_) return {};
  return connect();
}

// What fails here the peers may not know; what was aborted, all ranks do: every call waits for every rank.
void CollectiveTransport::end_call(const CallHeader&, const Failure* failure) {
  if (failure == nullptr) return;
  collectives_->abandon(*failure);
  must_connect_ = failure->kind == FailureKind::aborted;
}

void CollectiveTransport::reject_call(std::uint64_t call, const std::string& reason) {
  const CallHeader header{.call = call};
  if (!begin_call(header)) return;  // the peers are gone: their own failure says why
  const Failure aborted{.kind = FailureKind::aborted, .peer = rank_, .detail = reason};
  end_call(header, &aborted);
}

Expected<std::uint64_t> CollectiveTransport::reset(std::uint64_t last_call) {
  std::uint64_t agreed = 0;
  for (const auto& bytes : world_.all_gather(std::as_bytes(std::span(&last_call, 1)))) {
    std::uint64_t theirs = 0;
    std::memcpy(&theirs, bytes.data(), sizeof theirs);
    agreed = std::max(agreed, theirs);
  }
  if (auto connected = connect(); !connected) return unexpected(connected.error());
  return agreed;
}

// Counts go to everybody, as the decision on overflow needs the whole matrix; headers travel with them.
Expected<void> CollectiveTransport::exchange_counts(const CallHeader& header, std::span<const std::int32_t> mine,
                                                    std::vector<std::int32_t>& all) {
  const std::int64_t row_bytes = static_cast<std::int64_t>(sizeof(CallHeader) + mine.size_bytes());
  std::byte* const out = out_.of(row_bytes);
  std::byte* const in = in_.of(ranks_ * row_bytes);
  std::memcpy(out, &header, sizeof header);
  std::memcpy(out + sizeof header, mine.data(), mine.size_bytes());
  auto gathered = attempt(Phase::dispatch_counts, [&] {
    collectives_->all_gather_v({out, Dtype::uint8, {1, row_bytes}}, Counts(ranks_, 1), {in, Dtype::uint8, {ranks_, row_bytes}});
  });
  if (!gathered) return gathered;
  all.resize(ranks_ * mine.size());
  received_.resize(ranks_);
  std::vector<CallHeader> headers(ranks_);
  for (int source = 0; source < ranks_; ++source) {
    const std::byte* const row = in + source * row_bytes;
    std::int32_t* const counts = all.data() + source * mine.size();
    std::memcpy(&headers[source], row, sizeof(CallHeader));
    std::memcpy(counts, row + sizeof(CallHeader), mine.size_bytes());
    received_[source] = counts[rank_];
  }
  return check_headers(header, headers);
}

Expected<void> CollectiveTransport::check_headers(const CallHeader& mine, std::span<const CallHeader> headers) const {
  for (int peer = 0; peer < ranks_; ++peer) {
    if (headers[peer] == mine) continue;
    Failure failure{.kind = FailureKind::mismatch, .phase = Phase::dispatch_counts, .rank = rank_, .peer = peer, .epoch = mine.call};
    failure.detail = fmt::format("rank {} made {}; rank {} made {}", rank_, describe(mine), peer, describe(headers[peer]));
    return unexpected(std::move(failure));
  }
  return {};
}

}  // namespace tokenyard::exchange_internal
