#include "collective/agreement.h"

#include <fmt/core.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace tokenyard::collective_internal {
namespace {

const std::int64_t* send_counts(const CallRecord& record) { return reinterpret_cast<const std::int64_t*>(&record + 1); }
const std::int64_t* receive_counts(const CallRecord& record, int ranks) { return send_counts(record) + ranks; }

std::string describe(const CallRecord& record) {
  if (record.operation == Operation::barrier) return "barrier";
  return fmt::format("{} of {} x {}", name(record.operation), record.row_elements, tokenyard::name(record.dtype));
}

Failure mismatch(int rank, int first, int second, std::string detail) {
  return {.kind = FailureKind::mismatch,
          .phase = Phase::collective,
          .rank = rank,
          .peer = rank == first ? second : first,
          .detail = std::move(detail)};
}

}  // namespace

void write_record(CallRecord& record, const Call& call, int ranks) {
  record.operation = call.operation();
  record.dtype = call.dtype();
  record.row_elements = call.row_elements();
  auto* counts = reinterpret_cast<std::int64_t*>(&record + 1);
  for (int peer = 0; peer < ranks; ++peer) {
    counts[peer] = call.send(peer).count;
    counts[ranks + peer] = call.receive(peer).count;
  }
}

void write_rejection(CallRecord& record, std::string_view reason) {
  record.operation = Operation::rejected;
  const std::size_t length = std::min(reason.size(), sizeof(record.reason) - 1);
  std::memcpy(record.reason, reason.data(), length);
  record.reason[length] = '\0';
}

std::optional<Failure> find_disagreement(std::span<const CallRecord* const> records, int rank) {
  const int ranks = static_cast<int>(records.size());
  for (int peer = 0; peer < ranks; ++peer) {
    if (records[peer]->operation != Operation::rejected) continue;
    return Failure{.kind = FailureKind::aborted, .phase = Phase::collective, .rank = rank, .peer = peer, .detail = records[peer]->reason};
  }
  for (int peer = 1; peer < ranks; ++peer) {
    const CallRecord& a = *records[0];
    const CallRecord& b = *records[peer];
    if (a.operation == b.operation && a.dtype == b.dtype && a.row_elements == b.row_elements) continue;
    return mismatch(rank, 0, peer, fmt::format("rank 0 called {}, rank {} called {}", describe(a), peer, describe(b)));
  }
  for (int source = 0; source < ranks; ++source) {
    for (int target = 0; target < ranks; ++target) {
      const std::int64_t sent = send_counts(*records[source])[target];
      const std::int64_t expected = receive_counts(*records[target], ranks)[source];
      const bool in_place = source == target && (sent == 0 || expected == 0);
      if (sent == expected || in_place) continue;
      Failure failure = mismatch(rank, source, target,
                                 fmt::format("{}: rank {} sends {} rows to rank {}, which expects {}; pass the same counts on both",
                                             name(records[source]->operation), source, sent, target, expected));
      failure.expected = expected;
      failure.seen = sent;
      return failure;
    }
  }
  return std::nullopt;
}

}  // namespace tokenyard::collective_internal
