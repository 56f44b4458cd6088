// Beside the rows of a dispatch: waits for what has come, each in one block, and the end of a call of which parts ran beside each other.

#include "kernels/cuda/land.cuh"
#include "kernels/cuda/preload.h"

namespace tokenyard::cuda {
namespace {

constexpr int kAwaitThreads = 256;
constexpr int kEndThreads = 512;

// A word that `source` sets; 0: the call has failed.
__device__ std::uint64_t await_from(const Context& c, int source, const std::uint64_t* word, std::uint64_t call) {
  constexpr unsigned kPauseNs = 200;
  constexpr int kOwnPatience = 4;  // this rank's move sees to its own deadlines, of which it has a few, and knows whom to blame
  Context waiting = c;
  if (source == c.rank) waiting.timeout_ns *= kOwnPatience;
  return await_word(waiting, word, protocol::flag_word(call), {source, Phase::dispatch_rows, call, kPauseNs});
}

__global__ void await_landed(const __grid_constant__ Context c) {
  if (lane_index() == 0) await_from(c, c.rank, flag_of(c, Flag::landed, c.rank), call_number(c));
}

// Until what `source` sends of this part is here, by one warp. False: the call has failed.
__device__ bool await_source(const Context& c, const HandleView& handle, protocol::Part part, int source) {
  const std::int32_t begin = handle.source_begin[source];
  const std::int32_t end = part.end(handle.source_begin[source + 1] - begin);
  if (end == 0) return true;
  const std::int32_t token = handle.source_token[begin + end - 1];  // the last one: rows lie in the order of tokens
  const std::uint64_t call = call_number(c);
  std::uint64_t word = 0;
  if (lane_index() == 0) word = await_from(c, source, flag_of(c, Flag::records, source), call);  // with scales
  if (word != 0) word = await_from(c, source, arrival(c, c.rank, source, 0), call);
  word = __shfl_sync(kAllLanes, word, 0);
  if (word == 0) return false;
  const int groups = token / static_cast<std::int32_t>(protocol::flag_bits(word)) + 1;
  static_assert(protocol::kMostGroups <= kLanes);
  if (lane_index() < groups) word = await_from(c, source, arrival(c, c.rank, source, lane_index()), call);
  return __all_sync(kAllLanes, word != 0) != 0;
}

__global__ void __launch_bounds__(kAwaitThreads)
    await_part(const __grid_constant__ Context c, const __grid_constant__ HandleView handle, protocol::Part part) {
  if (block_has_failed(c)) return;
  // This rank's own rows first: behind them its move has begun, which peers may have waited for.
  bool good = true;
  if (warp_index() == 0) good = await_source(c, handle, part, c.rank);
  good = __syncthreads_and(good) != 0;
  for (int source = warp_index(); good && source < c.ranks; source += warps_of_block()) {
    if (source != c.rank) good = await_source(c, handle, part, source);
  }
}

__global__ void __launch_bounds__(kEndThreads) end_dispatch(const __grid_constant__ MoveArgs args) {
  const Context& c = args.context;
  const bool failed = block_has_failed(c);
  if (failed && !args.cached) {
    clear_handle(args);
    for (int local = threadIdx.x; local <= args.routing.local_experts; local += kEndThreads) args.handle.expert_offsets[local] = 0;
    __syncthreads();
  }
  end_call(c, failed, call_number(c));
}

const Preloaded preloaded({{await_landed}, {await_part}, {end_dispatch}});

}  // namespace

void launch_await_landed(const Context& context, Stream stream) { await_landed<<<1, kLanes, 0, stream>>>(context); }

void launch_await_part(const Context& context, const HandleView& handle, protocol::Part part, Stream stream) {
  await_part<<<1, kAwaitThreads, 0, stream>>>(context, handle, part);
}

void launch_end_dispatch(const MoveArgs& args, Stream stream) { end_dispatch<<<1, kEndThreads, 0, stream>>>(args); }

}  // namespace tokenyard::cuda
