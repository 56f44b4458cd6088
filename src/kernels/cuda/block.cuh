#pragma once
// What the kernels of a dispatch share: failures seen alike by a whole block, how a call begins without a plan, prefix sums.

#include "kernels/cuda/call.cuh"
#include "kernels/cuda/warp.cuh"

namespace tokenyard::cuda {

// Neighbours run on different multiprocessors: a few pieces of work spread over all of them.
__device__ __forceinline__ std::int64_t grid_warp() { return static_cast<std::int64_t>(warp_index()) * gridDim.x + blockIdx.x; }
__device__ __forceinline__ std::int64_t grid_warps() { return static_cast<std::int64_t>(warps_of_block()) * gridDim.x; }

// Threads of a block from one on, whole warps, which do something while those before it do something else.
struct Crew {
  int first = 0;
  __device__ int index() const { return static_cast<int>(threadIdx.x) - first; }
  __device__ int count() const { return static_cast<int>(blockDim.x) - first; }
  __device__ int warp() const { return index() / kLanes; }
  __device__ int warps() const { return count() / kLanes; }
  __device__ void sync() const {
    if (first == 0) {
      __syncthreads();
    } else {
      ptx::sync_crew(count());
    }
  }
};

// The part that one warp has in work which many share.
struct WarpShare {
  std::int64_t index = 0;  // among the warps that share
  std::int64_t count = 1;  // of them

  // Of the warps [first, first + warps) of every block of the grid; neighbours run on different multiprocessors.
  __device__ static WarpShare of(int first, int warps) {
    return {.index = static_cast<std::int64_t>(warp_index() - first) * gridDim.x + blockIdx.x,
            .count = static_cast<std::int64_t>(warps) * gridDim.x};
  }
  // Of all warps of the blocks [first, first + blocks).
  __device__ static WarpShare among(int first, int blocks) {
    return {.index = static_cast<std::int64_t>(warp_index()) * blocks + static_cast<int>(blockIdx.x) - first,
            .count = static_cast<std::int64_t>(warps_of_block()) * blocks};
  }
};

// Pieces of work, each for one warp. Warps begin with one each, and take the next as they come for it: some multiprocessors are
// nearer to the links than others. The counter is zero between kernels.
class Pieces {
 public:
  __device__ Pieces(std::uint32_t* counter, const WarpShare& share) : counter_(counter), count_(share.count), current_(share.index) {
    take();
  }
  __device__ std::int64_t current() const { return current_; }
  __device__ std::int64_t next() const { return __shfl_sync(kAllLanes, next_, 0); }
  __device__ void advance() {
    current_ = next();
    take();
  }

 private:
  // Long before it is needed, since it is a trip to the L2 cache.
  __device__ void take() {
    if (lane_index() == 0) next_ = count_ + atomicAdd(counter_, 1U);
  }
  std::uint32_t* counter_;
  std::int64_t count_;
  std::int64_t current_;
  std::int64_t next_ = 0;  // in lane 0
};

// has_failed, the same in every thread: one looks, for all blocks look at the same words.
__device__ inline bool block_has_failed(const Context& c) { return __syncthreads_or(threadIdx.x == 0 && has_failed(c)) != 0; }

// The header as this rank announces it: a cached dispatch names the call that filled the handle, and only the device knows it.
__device__ inline protocol::CallHeader complete_header(protocol::CallHeader header, const HandleView& handle) {
  if (header.handle_call != 0) header.handle_call = handle.header->call;
  return header;
}

// has_failed once more, and the end of the call.
__device__ inline void end_call(const Context& c) { end_call(c, block_has_failed(c), call_number(c)); }

// By all threads of one block, first in a call: tells the other ranks, and settles what came before. Block-uniform.
__device__ inline bool begin_call(const Context& c, const protocol::CallHeader& header, std::uint32_t offer, const CallState& state) {
  if (!leave_aborted(c, state)) return false;
  announce(c, header, offer, state.call);
  return wait_for_readers(c, state);
}

// Waits in this thread until `peer` has begun the call, and checks that what is about to be written is its to write.
__device__ inline bool has_begun(const Context& c, const protocol::CallHeader& header, const Wait& wait) {
  const bool is_combine = header.operation == protocol::Operation::combine;
  const std::uint64_t begun = await_word(c, flag_of(c, of_call(Flag::begun, wait.call), wait.peer), protocol::flag_word(wait.call), wait);
  return begun != 0 && (protocol::offered_buffer(begun) == protocol::kNoBuffer) == is_combine;
}

// By any block: waits until every other rank has begun the call. One block `checks` that it is the same one, and tells how long it has
// waited; the others check that what they are about to write is theirs to write, which harms no peer that makes another call. What a
// peer announces, it announces after it has left every earlier call. Block-uniform; false: the call has failed.
__device__ inline bool wait_for_peers(const Context& c, const protocol::CallHeader& header, Phase phase, std::uint64_t call, bool checks) {
  bool good = true;
#pragma unroll 1
  for (int peer = threadIdx.x; peer < c.ranks; peer += blockDim.x) {
    if (peer != c.rank) good = has_begun(c, header, {.peer = peer, .phase = phase, .call = call, .timed = checks}) && good;
  }
  if (checks) good = check_peers(c, header, phase, call) && good;
  return __syncthreads_and(good) != 0;
}

// The receive buffer that `rank` offers, which has begun this call and cannot end it without this block. This rank's own is known
// where its announcement may not be there yet.
__device__ inline int buffer_of(const Context& c, int rank, int own_buffer) {
  if (rank == c.rank) return own_buffer;
  return protocol::offered_buffer(max(*flag_of(c, Flag::begun, rank), *flag_of(c, Flag::begun_odd, rank)));
}

// What this rank has sent; by one warp.
__device__ inline void add_link_bytes(const Context& c, const std::int32_t* sent_counts, std::int64_t bytes_per_row) {
  if (c.link_bytes == nullptr) return;
#pragma unroll 1
  for (int rank = lane_index(); rank < c.ranks; rank += kLanes) {
    c.link_bytes[rank] += static_cast<std::uint64_t>(sent_counts[rank] * bytes_per_row);
  }
}

// column[step * i] for i < count becomes the sum of what lay before it; returns the sum of all. By one warp.
__device__ inline std::int32_t exclusive_scan_column(std::int32_t* column, std::int64_t step, std::int64_t count) {
  std::int32_t sum = 0;
  for (std::int64_t begin = 0; begin < count; begin += kLanes) {
    const std::int64_t i = begin + lane_index();
    const std::int32_t value = i < count ? column[i * step] : 0;
    const std::int32_t inclusive = inclusive_sum(value);
    if (i < count) column[i * step] = sum + inclusive - value;
    sum += __shfl_sync(kAllLanes, inclusive, kLanes - 1);
  }
  return sum;
}

}  // namespace tokenyard::cuda
