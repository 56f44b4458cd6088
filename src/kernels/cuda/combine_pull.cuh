#pragma once
// How a combine by pull begins and ends: the rows that peers made are partial sums already, and are added up straight from
// their memory.

#include "kernels/cuda/combine_sum.cuh"

namespace tokenyard::cuda {

// By every block. Block-uniform; false: the call has failed.
__device__ inline bool begin_pull(const CombineArgs& args) {
  const bool good = begin_combine(args);
  if (good && blockIdx.x == 0) add_link_bytes(args.context, args.handle.rank_counts, args.header.row_bytes);
  return good;
}

// By every block. Peers wait for the flag before they write their expert rows again, and this rank waits for theirs (settle).
__device__ inline void finish_pull(const Context& c) {
  if (!is_last_block(c, kCombineEnd)) return;
  if (threadIdx.x == 0) c.tickets[kCombinePieces] = 0;
  const std::uint64_t call = call_number(c);
  const bool failed = block_has_failed(c);
  // What has been read is in registers: nothing is left for a release to wait for.
  for (int peer = threadIdx.x; peer < c.ranks; peer += blockDim.x) {
    ptx::store_relaxed(&mailbox(c, peer, c.rank).flags[static_cast<int>(Flag::reads)], protocol::flag_word(call));
  }
  if (threadIdx.x == 0 && !failed) c.state->last_pull = call;
  __syncthreads();
  end_call(c, failed);
}

// Small batches are shared out evenly, for counting costs more than it brings.
__device__ inline std::uint32_t* piece_counter(const CombineArgs& args) {
  return args.mode == Mode::throughput ? &args.context.tickets[kCombinePieces] : nullptr;
}

// False: not for this call, or the lists of so many ranks do not fit into shared memory.
bool launch_combine_pull_async(const CombineArgs& args, Stream stream);

}  // namespace tokenyard::cuda
