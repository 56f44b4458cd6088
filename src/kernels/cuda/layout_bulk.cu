// A layout beside the move whose records it lays out, while rows are still on their way.

#include "core/preload.h"
#include "kernels/cuda/bulk.cuh"
#include "kernels/cuda/layout.cuh"

namespace tokenyard::cuda {
namespace {

// Until everything has landed, though rows are still on their way. What has failed does not land.
__device__ void wait_for_landing(const LayoutArgs& args) {
  const Context& c = args.context;
  const auto all = static_cast<std::uint32_t>(args.landing_warps);
  if (threadIdx.x == 0) {
    while (ptx::load_acquire_local(&c.tickets[kLandedTicket]) < all && !has_failed(c)) {
    }
  }
  __syncthreads();
}

// The layout of nothing, by one block: the call has failed meanwhile.
__device__ void lay_out_nothing(const LayoutArgs& args, const LayoutMemory& layout, GroupsMemory& memory) {
  for (int local = threadIdx.x; local < args.local_experts; local += static_cast<int>(blockDim.x)) layout.groups.kept[local] = 0;
  __syncthreads();
  make_groups(args, layout.groups, memory, true);
  if (threadIdx.x == 0) tell_groups(args, memory, true);
  fill_rest(args, layout.groups, 0, 1);
}

__global__ void __launch_bounds__(kLayoutWarps* kLanes, 1) lay_out_beside(const __grid_constant__ LayoutArgs args, int chunks) {
  extern __shared__ std::int32_t shared[];
  __shared__ GroupsMemory memory;
  const LayoutMemory layout = clear_sums(args, shared);
  wait_for_landing(args);
  lay_out_chunk(args, layout, memory, chunks);
  // One block waits for peers' rows: more might keep away the kernels of peers that share this GPU.
  if (!is_last_block(args.context, kPlacedTicket)) return;
  bulk::wait_for_previous();
  if (block_has_failed(args.context)) lay_out_nothing(args, layout, memory);
  if (threadIdx.x == 0) args.context.tickets[kLandedTicket] = 0;
  finish_layout(args, chunks);
}

const Preloaded preloaded({{lay_out_beside, kAllSharedMemory}});

}  // namespace

void launch_layout_beside(const LayoutArgs& args, Stream stream) {
  const LayoutLaunch start(args, stream, Resident::early);
  start.launch(lay_out_beside, args, start.chunks);
}

}  // namespace tokenyard::cuda
