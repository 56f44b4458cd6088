#include "device/pattern.h"
#include "kernels/cuda/ptx.cuh"

namespace tokenyard::device_test {
namespace {

constexpr int kThreads = 256;

__device__ std::uint8_t pattern(int writer, int owner, std::uint64_t round, std::size_t i) {
  return static_cast<std::uint8_t>(1 + (i * 31 + round * 7 + writer * 53 + owner * 101) % 251);
}

__device__ std::uint64_t* flags(const PatternArgs& args, int owner) { return reinterpret_cast<std::uint64_t*>(args.arenas[owner]); }
__device__ std::uint8_t* share(const PatternArgs& args, int owner, int writer) {
  return reinterpret_cast<std::uint8_t*>(args.arenas[owner]) + kFlagBytes + writer * args.share_bytes;
}

// One thread per peer waits for its flag; first: index of the flags of all ranks.
__device__ void await(const PatternArgs& args, int first, std::uint64_t wanted) {
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < args.ranks) {
    const std::uint64_t begin = cuda::ptx::global_timer_ns();
    while (cuda::ptx::load_acquire(flags(args, args.rank) + first + peer) < wanted) {
      if (cuda::ptx::global_timer_ns() - begin > args.timeout_ns) {
        args.result->timed_out_on = peer + 1;
        break;
      }
    }
  }
  __syncthreads();
}

// Everything this block did before is visible to whoever acquires the flag.
__device__ void tell_all(const PatternArgs& args, int first) {
  __syncthreads();
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < args.ranks) {
    __threadfence_system();
    cuda::ptx::store_release(flags(args, peer) + first + args.rank, args.round);
  }
}

__device__ void check(const PatternArgs& args, int owner, int writer) {
  std::uint64_t differences = 0;
  for (std::size_t i = threadIdx.x; i < args.share_bytes; i += kThreads) {
    if (share(args, owner, writer)[i] != pattern(writer, owner, args.round, i)) ++differences;
  }
  if (differences != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&args.result->differences), differences);
}

__global__ void __launch_bounds__(kThreads) write_and_check(PatternArgs args) {
  await(args, kMostRanks, args.round - 1);  // until all have checked the round before
  for (int owner = 0; owner < args.ranks; ++owner) {
    for (std::size_t i = threadIdx.x; i < args.share_bytes; i += kThreads) {
      share(args, owner, args.rank)[i] = pattern(args.rank, owner, args.round, i);
    }
  }
  tell_all(args, 0);
  await(args, 0, args.round);
  for (int peer = 0; peer < args.ranks; ++peer) {
    check(args, args.rank, peer);  // what they wrote here
    check(args, peer, args.rank);  // what this rank wrote there, read back
  }
  tell_all(args, kMostRanks);
}

}  // namespace

void load_pattern() {
  cudaFuncAttributes attributes = {};
  cudaFuncGetAttributes(&attributes, write_and_check);
}

void launch_pattern(const PatternArgs& args, CUstream_st* stream) { write_and_check<<<1, kThreads, 0, stream>>>(args); }

}  // namespace tokenyard::device_test
