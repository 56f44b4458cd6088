#pragma once
// Where this rank's own rows go among those of its experts, while others' are on their way: the clerks of a block place the tokens that it
// has counted.

#include "kernels/cuda/layout_parts.cuh"
#include "kernels/cuda/plan.cuh"

namespace tokenyard::cuda {

// True counts of all ranks, and what lies in front of this block's rows: those of lower ranks and of the blocks before. The sums of the
// plan are in another block's shared memory.
__device__ inline void sum_before(const MoveArgs& args, const LayoutMemory& layout, const Crew& crew) {
  const Context& c = args.context;
  const int experts = args.routing.local_experts;
  const std::uint64_t call = call_number(c);
  for (int local = crew.index(); local < experts; local += crew.count()) {
    std::int32_t before = 0, all = 0;
    for (int source = 0; source < c.ranks; ++source) {
      const auto count = protocol::count_in(ptx::load_relaxed(&count_row(c, c.rank, source, call)[c.shape.instance_word(c.rank, local)]));
      if (source < c.rank) before += count;
      all += count;
    }
#pragma unroll 16
    for (unsigned block = 0; block < blockIdx.x; ++block) before += args.own.counts[std::int64_t{block} * experts + local];
    layout.next[local] = before;
    layout.groups.kept[local] = all;
  }
}

// Behind a plan, whose memory it takes.
__device__ inline void place_own(const MoveArgs& args, PlanMemory& plan, GroupsMemory& memory, const Crew& crew) {
  const GroupArgs& groups = args.own.groups;
  const RoutingArgs& routing = args.routing;
  const CountShares share(args);
  if (share.begin() == share.end()) return;
  const int columns = layout_columns(groups);
  const LayoutMemory layout(plan.words(), columns);
  crew.sync();  // one block still needed its sums
  for (int i = crew.index(); i < protocol::layout_words(columns, crew.warps()); i += crew.count()) plan.words()[i] = 0;
  crew.sync();
  sum_before(args, layout, crew);
  sum_groups(groups, layout.groups, memory, crew);
  const std::int64_t tokens = routing.num_tokens;
  const Pairs pairs{std::int64_t{share.begin()} * kPlanChunk * routing.top_k,
                    min(std::int64_t{share.end()} * kPlanChunk, tokens) * routing.top_k};
  place_pairs(
      groups, layout, pairs, crew,
      [&](std::int64_t pair) {
        const auto token = static_cast<std::int32_t>(pair / routing.top_k);
        const Choice choice = choice_of(routing, args.context.rank, token, static_cast<int>(pair % routing.top_k));
        return choice.local_at(args.context.rank, routing.table.max_fanout);
      },
      [&](std::int64_t pair, std::int32_t local, std::int32_t number) {
        const bool is_kept = local >= 0 && number < kept_of(groups, layout.groups.kept[local]);
        args.own.places[pair] = is_kept ? layout.groups.begins[local] + number : -1;
      });
  crew.sync();
  if (crew.index() == 0) ptx::add_acquire_release(&args.context.tickets[kOwnPlacedTicket], 1U);
}

// By a warp: all of them are known.
__device__ inline void wait_for_own_places(const MoveArgs& args) {
  const CountShares share(args);
  if (lane_index() == 0) {
    while (ptx::load_acquire_local(&args.context.tickets[kOwnPlacedTicket]) < static_cast<std::uint32_t>(share.blocks())) {
    }
  }
  __syncwarp();
}

}  // namespace tokenyard::cuda
