// Throughput mode: waits for the rows of every source, then turns records into the handle's arrays.

#include <algorithm>

#include "kernels/cuda/preload.h"
#include "kernels/cuda/received.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kLandThreads = 1024;
enum Ticket { kLandTicket };

// The source of received row i: the first that ends behind it.
__device__ int source_of(const std::int32_t* source_begin, int ranks, std::int32_t i) {
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

__device__ void land_pairs(const LandArgs& args) {
  const Context& c = args.context;
  const HandleView& handle = args.handle;
  const std::byte* records = receive_records(c, c.rank, args.buffer);
  const std::int64_t record_bytes = c.shape.record_bytes();
  const std::int32_t rows = handle.header->num_rows;
  const auto top_k = static_cast<unsigned>(handle.top_k);
  const unsigned pairs = static_cast<unsigned>(c.shape.receive_rows) * top_k;  // at most 2^31
  const unsigned step = gridDim.x * kLandThreads;
  constexpr int kAtOnce = 4;  // loads under way
  for (unsigned begin = blockIdx.x * kLandThreads + threadIdx.x; begin < pairs; begin += kAtOnce * step) {
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

__global__ void __launch_bounds__(kLandThreads, 1) land_rows(const __grid_constant__ LandArgs args) {
  const Context& c = args.context;
  if (!block_has_failed(c) && wait_for_all(c, Flag::rows, Phase::dispatch_rows) && !args.cached) land_pairs(args);
  if (!is_last_block(c, kLandTicket)) return;
  if (!args.cached && block_has_failed(c)) {
    const std::int32_t tokens = args.handle.header->num_tokens;
    __syncthreads();
    clear_counts(c, args.handle, tokens, args.local_experts);
    clear_sent(c, args.handle, tokens);
    clear_received(args.handle, c.shape.receive_rows);
    __syncthreads();
  }
  if (args.last) end_call(c);
}

const Preloaded preloaded({{land_rows}});

}  // namespace

void launch_land(const LandArgs& args, Stream stream) {
  const std::int64_t pairs = args.context.shape.receive_rows * args.handle.top_k;
  const std::int64_t useful = std::max<std::int64_t>(1, (pairs + kLandThreads - 1) / kLandThreads);
  const auto blocks = args.cached ? 1 : std::min<std::int64_t>(useful, std::max(1, args.context.sm_budget));
  land_rows<<<static_cast<unsigned>(blocks), kLandThreads, 0, stream>>>(args);
}

}  // namespace tokenyard::cuda
