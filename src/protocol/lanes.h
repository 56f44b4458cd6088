#pragma once
// Collectives between GPUs move rows through staging memory in lanes: lane l of a source writes chunks l, l + lanes, ... of what it
// has for a destination, and lane l of that destination takes them out. Lanes know nothing of each other. Two words guard the slots of
// a lane between two ranks: `arrived`, in the destination's arena, says how many chunks of a call lie there, `consumed`, in the
// source's, how many were taken out. Both are flag words (device_mailbox.h): nothing is reset between calls.

#include <cstdint>

#include "protocol/arena.h"
#include "protocol/host_device.h"

namespace tokenyard::protocol {

constexpr int kLaneSlots = 4;                       // chunks of a lane between two ranks that may be under way
constexpr std::int64_t kLeastSlotBytes = 1024;      // so that the numbers of chunks fit into flag words
constexpr std::int64_t kLeastChunkBytes = 8 << 10;  // less is not worth a flag
constexpr std::int64_t kChunkAlignment = 16;

// What a rank tells every peer about a call, in the peer's arena: the two ends of a pair must say the same of it.
struct CollectiveHeader {
  std::uint64_t call = 0;
  std::int64_t row_bytes = 0;
  std::int64_t sends = 0;    // rows that the writer sends to the reader
  std::int64_t expects = 0;  // rows that it expects from the reader
  std::uint32_t operation = 0;
  std::uint32_t dtype = 0;

  constexpr TY_HOST_DEVICE bool fits(const CollectiveHeader& theirs) const {
    return call == theirs.call && row_bytes == theirs.row_bytes && operation == theirs.operation && dtype == theirs.dtype &&
           sends == theirs.expects && expects == theirs.sends;
  }
};

// Behind the flags of the arena. Offsets in bytes.
struct LaneLayout {
  int ranks = 1;
  int lanes = 1;
  std::int64_t slot_bytes = 0;
  std::int64_t headers = 0;  // [R writers][kHeaders]
  std::int64_t words = 0;    // arrived [R sources][lanes], then consumed [R destinations][lanes], a cache line each
  std::int64_t slots = 0;    // [R sources][lanes][kLaneSlots]
  std::int64_t total = 0;

  static constexpr int kHeaders = 4;  // of call c at c % kHeaders; ranks are never more than one call apart

  static constexpr TY_HOST_DEVICE LaneLayout of(int ranks, int lanes, std::int64_t slot_bytes, std::int64_t begin) {
    LaneLayout layout{.ranks = ranks, .lanes = lanes, .slot_bytes = slot_bytes};
    layout.headers = align_up(begin, kCacheLine);
    layout.words = align_up(layout.headers + ranks * kHeaders * static_cast<std::int64_t>(sizeof(CollectiveHeader)), kCacheLine);
    layout.slots = align_up(layout.words + 2 * kCacheLine * ranks * lanes, 4096);
    layout.total = layout.slots + ranks * lanes * kLaneSlots * slot_bytes;
    return layout;
  }
  constexpr TY_HOST_DEVICE std::int64_t header(int writer, std::uint64_t call) const {
    return headers + (std::int64_t{writer} * kHeaders + static_cast<std::int64_t>(call % kHeaders)) *
                         static_cast<std::int64_t>(sizeof(CollectiveHeader));
  }
  constexpr TY_HOST_DEVICE std::int64_t arrived(int source, int lane) const {
    return words + kCacheLine * (std::int64_t{source} * lanes + lane);
  }
  constexpr TY_HOST_DEVICE std::int64_t consumed(int destination, int lane) const {
    return words + kCacheLine * (std::int64_t{ranks + destination} * lanes + lane);
  }
  constexpr TY_HOST_DEVICE std::int64_t slot(int source, int lane, std::int64_t chunk) const {
    return slots + ((std::int64_t{source} * lanes + lane) * kLaneSlots + chunk % kLaneSlots) * slot_bytes;
  }
};

// Rows of a rank where counts are in memory of the device: `most` at the most, and none if a count makes no sense.
constexpr TY_HOST_DEVICE std::int64_t counted_rows(const std::int32_t* counts, int rank, std::int64_t most) {
  const std::int64_t count = counts[rank];
  return count < 0 ? 0 : count < most ? count : most;
}
// Those of the ranks before it.
constexpr TY_HOST_DEVICE std::int64_t counted_rows_before(const std::int32_t* counts, int rank, std::int64_t most) {
  std::int64_t sum = 0;
  for (int before = 0; before < rank; ++before) sum += counted_rows(counts, before, most);
  return sum;
}

// How `total` bytes between two ranks are cut: both ends cut alike. Chunks are full but for the last one of all, and so long that
// every lane has a few of them, as far as slots are.
struct LaneCut {
  std::int64_t total = 0;
  std::int64_t chunk_bytes = kLeastChunkBytes;
  int lanes = 1;

  static constexpr TY_HOST_DEVICE LaneCut of(std::int64_t total, int lanes, std::int64_t slot_bytes) {
    const std::int64_t pieces = std::int64_t{lanes} * kLaneSlots;
    std::int64_t bytes = align_up((total + pieces - 1) / pieces, kChunkAlignment);
    if (bytes < kLeastChunkBytes) bytes = kLeastChunkBytes;
    if (bytes > slot_bytes) bytes = slot_bytes;
    return {.total = total, .chunk_bytes = bytes, .lanes = lanes};
  }
  constexpr TY_HOST_DEVICE std::int64_t chunks() const { return (total + chunk_bytes - 1) / chunk_bytes; }
  // Of one lane.
  constexpr TY_HOST_DEVICE std::int64_t chunks_of(int lane) const {
    const std::int64_t all = chunks();
    return all > lane ? (all - lane + lanes - 1) / lanes : 0;
  }
  // The n-th chunk of a lane, from 0.
  constexpr TY_HOST_DEVICE std::int64_t begin(int lane, std::int64_t n) const { return (n * lanes + lane) * chunk_bytes; }
  constexpr TY_HOST_DEVICE std::int64_t bytes(int lane, std::int64_t n) const {
    const std::int64_t left = total - begin(lane, n);
    return left < chunk_bytes ? left : chunk_bytes;
  }
};

}  // namespace tokenyard::protocol
