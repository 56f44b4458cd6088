// A layout behind the kernel that has landed what it lays out.

#include "kernels/cuda/layout.cuh"

#include "core/preload.h"

namespace tokenyard::cuda {
namespace {

__global__ void __launch_bounds__(kLayoutWarps* kLanes, 1) lay_out(const __grid_constant__ LayoutArgs args, int chunks) {
  extern __shared__ std::int32_t shared[];
  __shared__ GroupsMemory memory;
  const LayoutMemory layout = clear_sums(args, shared);
  lay_out_chunk(args, layout, memory, chunks);
  if (is_last_block(args.context, kPlacedTicket)) finish_layout(args, chunks);
}

const Preloaded preloaded({{lay_out, kAllSharedMemory}});

}  // namespace

void launch_layout(const LayoutArgs& args, Stream stream) {
  if (args.landing_warps != 0) {
    launch_layout_beside(args, stream);
    return;
  }
  const LayoutLaunch start(args, stream, Resident::any);
  start.launch(lay_out, args, start.chunks);
}

}  // namespace tokenyard::cuda
