#pragma once
// Whether the rows of a dispatch fit: decided from the full count matrix, which every rank has, and in one order, so that
// all ranks come to the same decision.

#include <cstdint>

#include "protocol/arena.h"
#include "protocol/host_device.h"

namespace tokenyard::protocol {

struct CountLimits {
  std::int64_t receive_rows = 0;
  std::int64_t expert_capacity = 0;  // 0: none
  std::int64_t max_layout_rows = 0;  // 0: none
  std::int64_t alignment = 1;
  bool drop = false;           // rows beyond expert_capacity are no excess
  bool expert_layout = false;  // else only receive_rows counts
};

// Rows that an expert with `count` rows takes in its layout, padding included.
constexpr TY_HOST_DEVICE std::int64_t group_rows(const CountLimits& limits, std::int64_t count) {
  if (limits.drop && limits.expert_capacity != 0 && count > limits.expert_capacity) count = limits.expert_capacity;
  return align_up(count, limits.alignment);
}

// What the local experts of one rank need; may be tallied in parts that are then merged, in any order.
struct ExpertTally {
  std::int64_t pairs = 0;          // (row, k)
  std::int64_t layout_rows = 0;    // with padding, without drops
  std::int64_t excess_local = -1;  // the first local expert that exceeds its capacity; -1: none
  std::int64_t excess_count = 0;

  constexpr TY_HOST_DEVICE void add(const CountLimits& limits, std::int64_t local, std::int64_t count) {
    pairs += count;
    layout_rows += group_rows(limits, count);
    if (limits.expert_capacity == 0 || limits.drop || count <= limits.expert_capacity) return;
    merge({0, 0, local, count});
  }
  constexpr TY_HOST_DEVICE void merge(const ExpertTally& other) {
    pairs += other.pairs;
    layout_rows += other.layout_rows;
    if (other.excess_local < 0 || (excess_local >= 0 && excess_local < other.excess_local)) return;
    excess_local = other.excess_local;
    excess_count = other.excess_count;
  }
};

enum class Excess : std::uint8_t { none, receive_rows, expert_capacity, layout_rows };

struct Overflow {
  Excess excess = Excess::none;
  std::int64_t capacity = 0;
  std::int64_t needed = 0;
};

// The first limit that one rank breaks, which receives `rows` rows. Ranks are asked in ascending order.
constexpr TY_HOST_DEVICE Overflow find_overflow(const CountLimits& limits, std::int64_t rows, const ExpertTally& experts) {
  if (rows > limits.receive_rows) return {Excess::receive_rows, limits.receive_rows, rows};
  if (!limits.expert_layout) return {};
  if (experts.excess_local >= 0) return {Excess::expert_capacity, limits.expert_capacity, experts.excess_count};
  if (limits.max_layout_rows != 0 && experts.layout_rows > limits.max_layout_rows) {
    return {Excess::layout_rows, limits.max_layout_rows, experts.layout_rows};
  }
  return {};
}

}  // namespace tokenyard::protocol
