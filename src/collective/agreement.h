#pragma once
// What every rank tells the others before a call moves a byte, and the verdict that all of them draw from it. The
// verdict depends on nothing else, so either all ranks go on or all fail, and the next call starts from a clean state.

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "collective/call.h"
#include "tokenyard/error.h"

namespace tokenyard::collective_internal {

// Lives in symmetric memory; behind it lie send counts [R], then receive counts [R].
struct CallRecord {
  static constexpr int kReasonBytes = 400;
  Operation operation;
  Dtype dtype;
  std::int64_t row_elements;
  char reason[kReasonBytes];  // of a rejected call, zero-terminated
};
constexpr std::size_t call_record_bytes(int ranks) { return sizeof(CallRecord) + 2 * sizeof(std::int64_t) * ranks; }

void write_record(CallRecord& record, const Call& call, int ranks);
void write_rejection(CallRecord& record, std::string_view reason);

// The verdict over the records of all ranks as `rank` reports it: aborted names the lowest rank that rejected its call,
// mismatch names two ranks whose calls do not fit and what they called.
std::optional<Failure> find_disagreement(std::span<const CallRecord* const> records, int rank);

}  // namespace tokenyard::collective_internal
