// Moves rows by bulk copies, one mover a row: into shared memory and from there to each rank, two rows under way per mover.
// Quantised rows are made in shared memory instead of loaded.

#include <cuda_runtime_api.h>

#include <algorithm>

#include "core/preload.h"
#include "kernels/cuda/bulk.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/move.cuh"
#include "kernels/cuda/place_own.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kMaxMovers = 16;
constexpr int kStages = 2;  // of one row each; a third was not faster

struct MoverMemory {
  std::byte* stages;  // [kStages][row_bytes]
  std::byte* scales;  // of one row, where rows are quantised
  bulk::Barrier* barriers;
};

std::int64_t room_for_movers() { return most_shared_bytes() - static_cast<std::int64_t>(sizeof(PlanMemory)); }

__host__ __device__ std::int64_t mover_bytes(const MoveJob& job) {
  const std::int64_t scales = job.args.source.quantise ? protocol::align_up(job.scales.row_bytes, 16) : 0;
  return kStages * job.args.source.row_bytes + scales;
}

// By lane 0.
__device__ void prefetch(const MoveJob& job, std::int32_t token, const MoverMemory& memory, int stage) {
  const auto bytes = static_cast<std::uint32_t>(job.args.source.row_bytes);
  memory.barriers[stage].expect(bytes);
  bulk::load(memory.stages + stage * job.args.source.row_bytes, row_at(job.args.source, token), bytes, memory.barriers[stage]);
}

// The first row, which is the caller's, before slots are known. It has arrived before the block ends.
__device__ void begin_rows(const MoveJob& job, std::int32_t tokens, const MoverMemory& memory) {
  if (lane_index() == 0) {
    for (int i = 0; i < kStages; ++i) memory.barriers[i].init(1);
    bulk::publish_barriers();
    const std::int64_t first = mover_share().index;
    if (first < tokens) prefetch(job, static_cast<std::int32_t>(first), memory, 0);
  }
  __syncwarp();
}
__device__ void abandon_rows(std::int32_t tokens, const MoverMemory& memory) {
  if (mover_share().index < tokens) memory.barriers[0].wait(0);
}

// The whole row and its scales, by the warp; lane 0 may then store the row.
__device__ void quantise_row(const MoveJob& job, std::int32_t token, const MoverMemory& memory, int stage) {
  const SourceArgs& source = job.args.source;
  // The stores that read this stage were committed two rows ago, so all but the last group have been read.
  if (lane_index() == 0) bulk::wait_read<kStages - 1>();
  __syncwarp();
  const int blocks = (source.hidden_size + kQuantiseBlock - 1) / kQuantiseBlock;
  quantise_blocks(job, token, {.end = blocks}, {memory.stages + stage * source.row_bytes, memory.scales});
  bulk::fence_shared();
  __syncwarp();
}

// One of this rank's own rows to all its places at once. By the warp; lane 0 issues the stores.
__device__ void store_own_row(const MoveArgs& args, std::int32_t token, std::int32_t slot, const std::byte* row, std::uint32_t bytes) {
  const int top_k = args.handle.top_k;
  const std::int32_t* places =
      args.cached ? args.handle.output_row + std::int64_t{slot} * top_k : args.own.places + std::int64_t{token} * top_k;
  for (int begin = 0; begin < top_k; begin += kLanes) {
    const int k = begin + lane_index();
    const std::int32_t place = k < top_k ? places[k] : -1;
    for (unsigned left = __ballot_sync(kAllLanes, place >= 0); left != 0; left &= left - 1) {
      std::byte* to = args.own.rows + __shfl_sync(kAllLanes, place, __ffs(left) - 1) * std::int64_t{bytes};
      if (lane_index() == 0) bulk::store(to, row, bytes);
    }
  }
}

// By the warp; lane 0 issues one store per rank, and those to own places behind them. `placed`: these are known.
template <bool kPlacesOwn>
__device__ void store_row(const MoveJob& job, std::int32_t token, const std::byte* row, bool& placed) {
  const Context& c = job.args.context;
  const auto bytes = static_cast<std::uint32_t>(job.args.source.row_bytes);
  std::int32_t own_slot = -1;
  for (int first = 0; first < c.ranks; first += kLanes) {
    Targets targets = targets_of(job, token, first);
    if (const int own = c.rank - first; kPlacesOwn && own >= 0 && own < kLanes) {
      own_slot = __shfl_sync(kAllLanes, targets.slot, own);
      targets.present &= ~(1U << own);
    }
    for_each_lane(targets.present, start_lane(c, token, first), [&](int lane) {
      std::byte* to = of_lane(targets.row, lane);
      if (lane_index() == 0) bulk::store(to, row, bytes);
    });
  }
  if (kPlacesOwn && own_slot >= 0) {
    if (!placed) wait_for_own_places(job.args);
    placed = true;
    store_own_row(job.args, token, own_slot, row, bytes);
  }
  if (lane_index() == 0) bulk::commit();
}

// The scales that were made with a row.
__device__ void store_scales(const MoveJob& job, std::int32_t token, const std::byte* scales) {
  for (int first = 0; first < job.args.context.ranks; first += kLanes) {
    move_staged_scales(targets_of(job, token, first), scales, static_cast<int>(job.scales.row_bytes / 4), 0);
  }
}

template <bool kQuantise, bool kPlacesOwn>
__device__ void move_rows(const MoveJob& job, std::int32_t tokens, const MoverMemory& memory) {
  const MoveArgs& args = job.args;
  Pieces next(&args.context.tickets[kRowsTicket], mover_share());
  bool placed = args.cached;
  int stage = 0;
  std::uint32_t parity = 0;
  for (; next.current() < tokens; next.advance()) {
    const auto token = static_cast<std::int32_t>(next.current());
    if constexpr (kQuantise) {
      quantise_row(job, token, memory, stage);
    } else {
      memory.barriers[stage].wait(parity);
    }
    store_row<kPlacesOwn>(job, token, memory.stages + stage * args.source.row_bytes, placed);
    if (kQuantise) store_scales(job, token, memory.scales);
    if (const std::int64_t ahead = next.next(); !kQuantise && lane_index() == 0 && ahead < tokens) {
      bulk::wait_read<kStages - 1>();  // the other stage's stores have read it; this one's may go on
      prefetch(job, static_cast<std::int32_t>(ahead), memory, stage ^ 1);
    }
    __syncwarp();
    stage ^= 1;
    if (stage == 0) parity ^= 1;
  }
  if (lane_index() != 0) return;
  // This thread's bulk stores are complete, and ordered before the flag that is_last_block leads to.
  bulk::drain();
  bulk::fence_all();
}

// By a clerk that has landed its share: a layout that follows needs no rows.
__device__ void let_layout_begin(const MoveArgs& args) {
  if (args.table.counts == nullptr) return;
  __syncwarp();
  if (lane_index() != 0) return;
  ptx::add_acquire_release(&args.context.tickets[kLandedTicket], 1U);
  bulk::let_next_begin();
}

// kPlacesOwn: with MoveArgs::own. A kernel of its own, so that the other has fewer instructions.
template <bool kQuantise, bool kPlacesOwn>
__global__ void __launch_bounds__((kMaxMovers + kClerks) * kLanes, 1) move_rows_bulk(const __grid_constant__ MoveJob job) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ bulk::Barrier barriers[kMaxMovers][kStages];
  __shared__ PlanMemory plan;
  [[maybe_unused]] __shared__ GroupsMemory groups;
  const std::int32_t tokens = tokens_of(job.args);
  MoverMemory memory{};
  if (is_mover()) {
    std::byte* const mine = shared + warp_index() * mover_bytes(job);
    memory = {mine, mine + kStages * job.args.source.row_bytes, barriers[warp_index()]};
  }
  const bool good = begin_move(job.args, plan, [&] {
    if (!kQuantise && is_mover()) begin_rows(job, tokens, memory);
  });
  if (!is_mover()) {
    if (good) {
      if constexpr (kPlacesOwn) {
        if (!job.args.cached) place_own(job.args, plan, groups, clerks());
      }
      work_beside_rows(job, clerk_share());
      let_layout_begin(job.args);
    }
  } else if (good) {
    move_rows<kQuantise, kPlacesOwn>(job, tokens, memory);
  } else if (!kQuantise) {
    abandon_rows(tokens, memory);
  }
  __syncwarp();
  finish_move(job);
}

const Preloaded preloaded({{move_rows_bulk<false, false>, kAllSharedMemory},
                           {move_rows_bulk<false, true>, kAllSharedMemory},
                           {move_rows_bulk<true, false>, kAllSharedMemory},
                           {move_rows_bulk<true, true>, kAllSharedMemory}});

}  // namespace

bool can_move_bulk(const MoveJob& job) {
  const bool aligned = job.args.source.quantise || job.row_width == 16;
  return aligned && has_bulk_copies() && room_for_movers() >= mover_bytes(job);
}

void launch_move_bulk(const MoveJob& job, Stream stream) {
  const std::int64_t bytes = mover_bytes(job);
  const std::int64_t movers = std::min<std::int64_t>(kMaxMovers, room_for_movers() / bytes);
  const Launch launch(job.args.blocks, static_cast<int>(movers + kClerks) * kLanes, static_cast<std::size_t>(movers * bytes), stream,
                      Resident::together);
  if (job.args.own.rows != nullptr) {
    launch(job.args.source.quantise ? move_rows_bulk<true, true> : move_rows_bulk<false, true>, job);
  } else {
    launch(job.args.source.quantise ? move_rows_bulk<true, false> : move_rows_bulk<false, false>, job);
  }
}

}  // namespace tokenyard::cuda
