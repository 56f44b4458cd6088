#pragma once
// What the kernels of a rank count, from one launch of a call to the next: its own memory, which no peer reads.

#include <utility>

#include "protocol/arena.h"

namespace tokenyard::protocol {

constexpr int kPlanChunk = 64;           // tokens
constexpr int kHistogramWords = 2048;    // up to so many counts a block adds up in shared memory first
constexpr int kLayoutChunk = 128;        // received rows, or a multiple of it
constexpr int kMostLayoutChunks = 256;   // a block each, which sums up what all of them hold
constexpr int kFewestLayoutBlocks = 32;  // those without a chunk help to fill what no row goes to

// Received rows in a chunk.
TY_HOST_DEVICE constexpr std::int64_t layout_chunk_rows(const ArenaShape& shape) {
  const std::int64_t smallest = std::int64_t{kLayoutChunk} * kMostLayoutChunks;
  const std::int64_t times = (shape.receive_rows + smallest - 1) / smallest;
  return kLayoutChunk * (times > 1 ? times : 1);
}

TY_HOST_DEVICE constexpr std::int64_t layout_blocks(const ArenaShape& shape) {
  const std::int64_t chunks = (shape.receive_rows + layout_chunk_rows(shape) - 1) / layout_chunk_rows(shape);
  return chunks > kFewestLayoutBlocks ? chunks : kFewestLayoutBlocks;
}
// What a block of so many warps sums up. More columns than this do not fit into the shared memory of every GPU, not even for one warp.
constexpr int kMostSharedColumns = 4097;
TY_HOST_DEVICE constexpr std::int64_t layout_words(std::int64_t columns, int warps) { return columns * (3 + warps); }

// Offsets in int32 words; every part starts on a cache line.
struct DeviceScratch {
  std::int64_t number = 0;         // [M][R]: a token's row among those of its chunk for a rank
  std::int64_t before = 0;         // [ceil(M / kPlanChunk)][R]: rows of earlier chunks
  std::int64_t base = 0;           // [R]: rows of lower ranks
  std::int64_t counts = 0;         // [count_words()]
  std::int64_t own_counts = 0;     // [ceil(M / kPlanChunk)][L]: how often tokens of a block ask for each local expert
  std::int64_t own_places = 0;     // [M][K]: where this rank's rows go among those of its own experts
  std::int64_t layout_counts = 0;  // [ceil(receive_rows / layout_chunk_rows())][L + 1]
  std::int64_t layout_sums = 0;    // [layout_blocks()][layout_words(L + 1, 1)] with more than kMostSharedColumns
  std::int64_t words = 0;
  constexpr std::int64_t bytes() const { return words * 4; }
};

constexpr DeviceScratch device_scratch(const ArenaShape& shape) {
  DeviceScratch scratch;
  const auto part = [&scratch](std::int64_t count) {
    return std::exchange(scratch.words, scratch.words + align_up(count, kCacheLine / 4));
  };
  const auto chunks = [](std::int64_t items, std::int64_t chunk) { return (items + chunk - 1) / chunk; };
  scratch.number = part(shape.max_tokens_per_rank * shape.ranks);
  scratch.before = part(chunks(shape.max_tokens_per_rank, kPlanChunk) * shape.ranks);
  scratch.base = part(shape.ranks);
  scratch.counts = part(shape.count_words());
  scratch.own_counts = part(chunks(shape.max_tokens_per_rank, kPlanChunk) * shape.max_local_experts);
  scratch.own_places = part(shape.max_tokens_per_rank * shape.top_k);
  scratch.layout_counts = part(chunks(shape.receive_rows, layout_chunk_rows(shape)) * (shape.max_local_experts + 1));
  const std::int64_t columns = shape.max_local_experts + 1;
  scratch.layout_sums = part(columns > kMostSharedColumns ? layout_blocks(shape) * layout_words(columns, 1) : 0);
  return scratch;
}

}  // namespace tokenyard::protocol
