// Where this rank's own rows go among those of its experts, before they move: a block for each chunk of tokens that the plan counted.

#include "core/preload.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/layout_parts.cuh"
#include "kernels/cuda/routing.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kPlaceWarps = 32;

// In front of a chunk's rows of a local expert lie those of lower ranks and of earlier chunks. By the block.
__device__ void sum_before(const PlaceOwnArgs& args, const LayoutMemory& layout) {
  const Context& c = args.layout.context;
  const int experts = args.layout.local_experts;
  const std::uint64_t call = call_number(c);
  for (int local = threadIdx.x; local < experts; local += static_cast<int>(blockDim.x)) {
    std::int32_t before = 0;
    for (int source = 0; source < c.rank; ++source) {
      before += protocol::count_in(count_row(c, c.rank, source, call)[c.shape.instance_word(c.rank, local)]);
    }
#pragma unroll 8
    for (unsigned chunk = 0; chunk < blockIdx.x; ++chunk) before += args.counts[std::int64_t{chunk} * experts + local];
    layout.next[local] = before;
    layout.groups.kept[local] = args.layout.handle.expert_counts[local];  // true counts, still
  }
}

__global__ void __launch_bounds__(kPlaceWarps* kLanes, 1) place_own(const __grid_constant__ PlaceOwnArgs args) {
  extern __shared__ std::int32_t shared[];
  __shared__ GroupsMemory memory;
  const Context& c = args.layout.context;
  const RoutingArgs& routing = args.routing;
  const int columns = layout_columns(args.layout);
  const LayoutMemory layout(shared, columns);
  for (int i = threadIdx.x; i < protocol::layout_words(columns, warps_of_block()); i += static_cast<int>(blockDim.x)) shared[i] = 0;
  if (block_has_failed(c)) return;  // with a barrier
  sum_before(args, layout);
  make_groups(args.layout, layout.groups, memory, false);
  const std::int64_t begin = std::int64_t{blockIdx.x} * kPlanChunk;
  const std::int64_t end = min(begin + kPlanChunk, std::int64_t{routing.num_tokens});
  place_pairs(
      args.layout, layout, begin * routing.top_k, end * routing.top_k,
      [&](std::int64_t pair) {
        const auto token = static_cast<std::int32_t>(pair / routing.top_k);
        Choice choice;
        choice.shards = shards_for(routing, c.rank, token, id_at(routing, token, static_cast<int>(pair % routing.top_k)));
        if (choice.shards != nullptr) choice.first = choice.shards[0];
        return choice.local_at(c.rank, routing.table.max_fanout);
      },
      [&](std::int64_t pair, std::int32_t local, std::int32_t number) {
        args.places[pair] = local >= 0 && number < layout.groups.kept[local] ? layout.groups.begins[local] + number : -1;
      });
}

const Preloaded preloaded({{place_own, kAllSharedMemory}});

}  // namespace

void launch_place_own(const PlaceOwnArgs& args, Stream stream) {
  const int chunks = (args.routing.num_tokens + kPlanChunk - 1) / kPlanChunk;
  if (chunks == 0) return;
  const int columns = args.layout.local_experts + 1;
  int warps = kPlaceWarps;  // as many as there is room for the counts of
  while (warps > 1 && protocol::layout_words(columns, warps) * 4 > most_shared_bytes()) warps /= 2;
  const Launch launch(chunks, warps * kLanes, static_cast<std::size_t>(protocol::layout_words(columns, warps) * 4), stream, Resident::any);
  launch(place_own, args);
}

}  // namespace tokenyard::cuda
