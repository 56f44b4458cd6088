#pragma once
// What is beside the rows of a move: records, which are sent and land while rows are on their way; and how a move ends.

#include "kernels/cuda/move_job.h"
#include "kernels/cuda/received.cuh"
#include "protocol/progress.h"

namespace tokenyard::cuda {

enum MoveTicket { kRowsTicket, kRecordsTicket, kLandedTicket, kMoveEnd, kGroupTickets };
constexpr int kMoveTickets = kGroupTickets + protocol::kMostGroups;
static_assert(kMoveTickets <= protocol::kTickets / 2);  // the rest is for what runs beside

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
    }
  }
}

// True in the last of `warps` that comes here: it sees what the others have done.
__device__ inline bool is_last_warp(const Context& c, MoveTicket ticket, std::int64_t warps) {
  __syncwarp();
  bool last = false;
  if (lane_index() == 0) last = ptx::add_acquire_release(&c.tickets[ticket], 1U) == warps - 1;
  return __any_sync(kAllLanes, last) != 0;
}

// By a warp that has sent the records of its share: the last of `warps` tells every rank.
__device__ inline void publish_records(const Context& c, std::int64_t warps) {
  if (!is_last_warp(c, kRecordsTicket, warps)) return;
  const std::uint64_t call = call_number(c);
  for (int i = lane_index(); i < c.ranks; i += kLanes) set_flag(c, Flag::records, (c.rank + 1 + i) % c.ranks, call);
}

// By a warp that has landed its share: the last of `warps` tells the kernels beside this one.
__device__ inline void publish_landed(const Context& c, std::int64_t warps) {
  if (is_last_warp(c, kLandedTicket, warps) && lane_index() == 0) set_flag(c, Flag::landed, c.rank, call_number(c));
}

// By one thread, to which a token's stores to all its ranks are complete: the last one of a group tells every rank.
__device__ inline void publish_group(const Context& c, std::int32_t tokens, std::int32_t token) {
  const std::int32_t size = protocol::group_size(tokens);
  const std::int32_t group = token / size;
  const auto before = static_cast<std::int32_t>(ptx::add_acquire_release(&c.tickets[kGroupTickets + group], 1U));
  if (before != protocol::tokens_of_group(tokens, group) - 1) return;
  const std::uint64_t word = protocol::flag_word(call_number(c), static_cast<std::uint32_t>(size));
  __threadfence_system();  // once, not a release for each rank
  for (int i = 0; i < c.ranks; ++i) ptx::store_relaxed(arrival(c, (c.rank + 1 + i) % c.ranks, c.rank, group), word);
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
  const std::int32_t tokens = args.handle.header->num_tokens;
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
  if (threadIdx.x < kMoveTickets && threadIdx.x != kMoveEnd) c.tickets[threadIdx.x] = 0;
  const std::uint64_t call = call_number(c);
  bool good = !block_has_failed(c);
  if (good) {
    set_flag_everywhere(c, Flag::rows, call);
    if (warp_index() == 0) add_link_bytes(c, args.handle.sent_counts, args.source.row_bytes + job.scales.row_bytes);
    good = wait_for_all(c, Flag::rows, Phase::dispatch_rows, call, true);
  }
  if (!good && !args.cached && !args.beside) clear_handle(args);
  if (args.last) end_call(c, !good, call);
}

}  // namespace tokenyard::cuda
