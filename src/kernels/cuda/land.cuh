#pragma once
// What is beside the rows of a move: records, which are sent and land while rows are on their way; and how a move ends.

#include "kernels/cuda/move_job.h"
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/received.cuh"

namespace tokenyard::cuda {

enum MoveTicket { kRowsTicket, kRecordsTicket, kMoveEnd };

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

// This warp's share of the received pairs.
__device__ inline void land_pairs(const MoveArgs& args, const WarpShare& share) {
  const Context& c = args.context;
  const HandleView& handle = args.handle;
  const std::byte* records = receive_records(c, c.rank, args.buffer);
  const std::int64_t record_bytes = c.shape.record_bytes();
  const std::int32_t rows = handle.header->num_rows;
  const auto top_k = static_cast<unsigned>(handle.top_k);
  const unsigned pairs = static_cast<unsigned>(c.shape.receive_rows) * top_k;  // at most 2^31
  const auto step = static_cast<unsigned>(share.count) * kLanes;
  constexpr int kAtOnce = 4;  // loads under way
  for (unsigned begin = static_cast<unsigned>(share.index) * kLanes + lane_index(); begin < pairs; begin += kAtOnce * step) {
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
      count_pair(args, row, static_cast<int>(at % top_k), pair[i]);
    }
  }
}

// By a warp that has sent the records of its share: the last of `warps` tells every rank.
__device__ inline void publish_records(const Context& c, std::int64_t warps) {
  __syncwarp();
  bool last = false;
  if (lane_index() == 0) last = ptx::add_acquire_release(&c.tickets[kRecordsTicket], 1U) == warps - 1;
  if (!__any_sync(kAllLanes, last)) return;
  const std::uint64_t call = call_number(c);
  for (int i = lane_index(); i < c.ranks; i += kLanes) set_flag(c, Flag::records, (c.rank + 1 + i) % c.ranks, call);
}

// False: the call has failed.
__device__ inline bool wait_for_records(const Context& c) {
  // Many warps wait for long. Without pauses moves took up to twice as long on some numbers of multiprocessors (docs/kernels.md),
  // presumably because movers read the same line.
  constexpr unsigned kPauseNs = 500;
  const std::uint64_t call = call_number(c);
  bool good = true;
  for (int peer = lane_index(); peer < c.ranks; peer += kLanes) {
    const std::uint64_t* const word = flag_of(c, Flag::records, peer);
    good = wait_for_word(c, word, protocol::flag_word(call), {peer, Phase::dispatch_rows, call, kPauseNs}) && good;
  }
  return __all_sync(kAllLanes, good) != 0;
}

// What a dispatch that failed leaves.
__device__ inline void clear_handle(const MoveArgs& args) {
  const std::int32_t tokens = tokens_of(args);
  __syncthreads();
  clear_counts(args.context, args.handle, tokens, args.routing.local_experts);
  clear_sent(args.context, args.handle, tokens);
  clear_received(args.handle, args.context.shape.receive_rows);
  __syncthreads();
}

// By all threads of all blocks; each thread's stores are complete, or ordered by the ticket. The last block tells every rank that
// its rows are there, and waits for the others'.
__device__ inline void finish_move(const MoveJob& job) {
  const MoveArgs& args = job.args;
  const Context& c = args.context;
  if (!is_last_block(c, kMoveEnd)) return;
  const CallState state = state_of_call(c);
  bool good = !state.failed;
  if (good) {
    set_flag_everywhere(c, Flag::rows, state.call);
    if (warp_index() == 0) add_link_bytes(c, args.handle.sent_counts, args.source.row_bytes + job.scales.row_bytes);
    good = wait_for_all(c, Flag::rows, Phase::dispatch_rows, state.call, true);
  }
  if (!good && !args.cached) clear_handle(args);
  if (threadIdx.x == 0) c.tickets[kRowsTicket] = c.tickets[kRecordsTicket] = 0;
  if (!args.cached) clear_plan(args);
  if (args.last) end_call(c, !good, state.call);
}

}  // namespace tokenyard::cuda
