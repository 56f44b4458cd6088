#pragma once
// How a move ends: the rows of every source are here, and their records become the handle's arrays.

#include "kernels/cuda/move_job.h"
#include "kernels/cuda/received.cuh"

namespace tokenyard::cuda {

enum MoveTicket { kSentTicket, kLandedTicket };

// The source of received row i: the first that ends behind it.
__device__ inline int source_of(const std::int32_t* source_begin, int ranks, std::int32_t i) {
  int low = 0, high = ranks - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (source_begin[middle + 1] > i) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

__device__ inline void land_pairs(const MoveArgs& args) {
  const Context& c = args.context;
  const HandleView& handle = args.handle;
  const std::byte* records = receive_records(c, c.rank, args.buffer);
  const std::int64_t record_bytes = c.shape.record_bytes();
  const std::int32_t rows = handle.header->num_rows;
  const auto top_k = static_cast<unsigned>(handle.top_k);
  const unsigned pairs = static_cast<unsigned>(c.shape.receive_rows) * top_k;  // at most 2^31
  const unsigned step = gridDim.x * blockDim.x;
  constexpr int kAtOnce = 4;  // loads under way
  for (unsigned begin = blockIdx.x * blockDim.x + threadIdx.x; begin < pairs; begin += kAtOnce * step) {
    ReceivedPair pair[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned at = begin + i * step;
      const auto row = static_cast<std::int32_t>(at / top_k);
      if (at < pairs && row < rows) pair[i] = read_pair(records + row * record_bytes, static_cast<int>(at % top_k), handle.top_k);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned at = begin + i * step;
      if (at >= pairs) break;
      const auto row = static_cast<std::int32_t>(at / top_k);
      const int source = at % top_k == 0 && row < rows ? source_of(handle.source_begin, c.ranks, row) : -1;
      write_pair(handle, row, static_cast<int>(at % top_k), source, pair[i]);
    }
  }
}

// By the last block that has sent: every rank may read what this rank's blocks wrote for it. Each thread's stores are complete, or
// ordered by the ticket.
__device__ inline void publish_rows(const MoveJob& job) {
  const Context& c = job.args.context;
  if (block_has_failed(c)) return;
  set_flag_everywhere(c, Flag::rows);
  add_link_bytes(c, job.args.handle.sent_counts, job.args.source.row_bytes + job.scales.row_bytes);
}

// What a dispatch that failed leaves.
__device__ inline void clear_handle(const MoveArgs& args) {
  const std::int32_t tokens = args.handle.header->num_tokens;
  __syncthreads();
  clear_counts(args.context, args.handle, tokens, args.routing.local_experts);
  clear_sent(args.context, args.handle, tokens);
  clear_received(args.handle, args.context.shape.receive_rows);
  __syncthreads();
}

// By all threads of all blocks, which wait for the last one to have sent: all of them are resident at once.
__device__ inline void finish_move(const MoveJob& job) {
  const MoveArgs& args = job.args;
  const Context& c = args.context;
  if (is_last_block(c, kSentTicket)) publish_rows(job);
  if (!args.cached && !block_has_failed(c) && wait_for_all(c, Flag::rows, Phase::dispatch_rows)) land_pairs(args);
  if (!is_last_block(c, kLandedTicket)) return;
  const bool failed = block_has_failed(c);
  if (args.cached && !failed) wait_for_all(c, Flag::rows, Phase::dispatch_rows);
  if (!args.cached && failed) clear_handle(args);
  if (args.last) end_call(c);
}

}  // namespace tokenyard::cuda
