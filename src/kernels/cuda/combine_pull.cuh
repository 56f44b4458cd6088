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
  set_flag_everywhere(c, Flag::reads);
  if (threadIdx.x == 0 && !has_failed(c)) c.state->last_pull = call_number(c);
  __syncthreads();
  end_call(c);
}

// False: not for this call, these lists or this GPU (compute capability 9.0).
bool launch_combine_pull_bulk(const CombineArgs& args, Stream stream);

}  // namespace tokenyard::cuda
