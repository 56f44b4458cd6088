// A plan in a kernel of its own: something else follows before rows move.

#include "kernels/cuda/plan.cuh"

#include <algorithm>

#include "core/preload.h"

namespace tokenyard::cuda {
namespace {

constexpr int kPlanThreads = 1024;

__global__ void __launch_bounds__(kPlanThreads) plan_dispatch(const __grid_constant__ PlanArgs args) {
  __shared__ PlanMemory memory;
  count_tokens(args, memory);
  if (!is_last_block(args.context, kCountedTicket)) return;
  finish_plan(args, memory, exchange_counts(args, memory, [] {}), {});
  __syncthreads();
  clear_plan(args);
}

const Preloaded preloaded({{plan_dispatch}});

}  // namespace

void launch_plan(const PlanArgs& args, Stream stream) {
  const int chunks = (args.routing.num_tokens + kPlanChunk - 1) / kPlanChunk;
  const int blocks = std::max(chunks, 1);  // also without tokens there are counts to exchange
  plan_dispatch<<<blocks, kPlanThreads, 0, stream>>>(args);
}

}  // namespace tokenyard::cuda
