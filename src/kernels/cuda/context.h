#pragma once
// What every kernel of the exchange knows: arenas, shape, flags, deadline. Trivially copyable, passed by value.

#include <cstddef>
#include <cstdint>

#include "placement/table.h"
#include "protocol/arena.h"
#include "protocol/device_words.h"

struct CUstream_st;

namespace tokenyard::cuda {

using Stream = CUstream_st*;  // a cudaStream_t

struct Context : protocol::WordsView {
  protocol::ArenaShape shape;
  std::uint64_t* link_bytes = nullptr;  // [ranks] bytes sent to each rank so far, device memory
  unsigned long long* waits = nullptr;  // [ranks] of the caller: nanoseconds that a call waits for each rank are added; null: not wanted
};

// What a dispatch learned, in device memory that belongs to the handle. Received rows are indexed by i < capacity():
// throughput mode: i = slot, rows [0, N) in order (source rank, token); latency mode: i = source * M + token, absent rows
// have source_token -1. Beyond what arrived: source_token and source_rank -1, local_ids -1, weights 0.
struct HandleView {
  struct Header {              // one, in device memory
    std::uint64_t call;        // of the dispatch that filled it (the last replay)
    std::int32_t num_tokens;   // T of this rank
    std::int32_t num_rows;     // N, rows received
    std::int32_t layout_rows;  // expert_major: N' with padding; expert_padded: sum of counts; else N
    std::int32_t invalid_ids;  // ids >= E of this rank's tokens
    std::int32_t lost_ids;     // ids of experts without an instance
    std::int32_t reserved;
  };
  Header* header = nullptr;
  // Source side.
  std::int32_t* slots = nullptr;        // [M][R]: index i of the token's row at rank d, -1: none
  std::uint64_t* k_masks = nullptr;     // [M][R]: the top-k positions that rank d serves
  std::int32_t* sent_counts = nullptr;  // [R]
  // Receiver side.
  std::int32_t* rank_counts = nullptr;   // [R]
  std::int32_t* source_begin = nullptr;  // [R+1]: throughput: first i of each source; latency: source * M
  std::int32_t* source_rank = nullptr;   // [receive_rows]
  std::int32_t* source_token = nullptr;  // [receive_rows]
  std::int32_t* partial_slot = nullptr;  // [receive_rows]: token * partials_per_token + ordinal; -1: this rank's own token
  std::int32_t* local_ids = nullptr;     // [receive_rows][K]
  float* weights = nullptr;              // [receive_rows][K]
  // Layout. output_row: where row i (token layouts; width 1) or (i, k) (expert layouts; width K) lies in the output; -1: absent or dropped.
  std::int32_t* output_row = nullptr;      // [receive_rows][K]
  std::int32_t* expert_counts = nullptr;   // [L] true counts without drops
  std::int32_t* expert_offsets = nullptr;  // [L+1]
  std::int64_t* dropped = nullptr;         // [L]
  std::int32_t* gather_map = nullptr;      // [expert_rows_bound]
  // Metadata in the order of the output, where it is not that of i: expert layouts, and token_major in latency mode.
  std::int32_t* out_local_ids = nullptr;    // token_major in latency mode [receive_rows][K]
  float* out_weights = nullptr;             // [receive_rows][K], or [output rows] of expert layouts
  std::int32_t* out_source_rank = nullptr;  // [output rows]
  std::int32_t* out_source_token = nullptr;
  std::int32_t* out_source_k = nullptr;
  std::int32_t* ranges = nullptr;   // expert_padded [L][R][2]
  std::uint8_t* present = nullptr;  // rank_slots [R][M]
  int top_k = 1;
};

}  // namespace tokenyard::cuda
