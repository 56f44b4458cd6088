// Moves rows with register copies, one warp a row: any device, any alignment. A row is read once and stored once per rank.

#include "core/preload.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/move.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kMovers = 16;
constexpr int kVectorThreads = (kMovers + kClerks) * kLanes;
constexpr int kUnroll = 7;  // loads under way in each lane
constexpr int kPieceBytes = kUnroll * kLanes * 16;
constexpr int kPieceBlocks = kPieceBytes / kQuantiseBlock;
static_assert(kPieceBytes % kQuantiseBlock == 0 && kPieceBlocks % 4 == 0, "a piece has whole scale words");

// One per warp, where rows are quantised.
struct alignas(16) PieceStage {
  std::byte elements[kPieceBytes];
  std::byte scales[kPieceBlocks * 4];
};

// What lies `piece` bytes behind the row's first, into registers; v[j] of lane l is 16-byte vector 32 * j + l.
__device__ void load_piece(const MoveJob& job, std::int32_t token, std::int64_t piece, int4 (&v)[kUnroll]) {
  const std::byte* row = row_at(job.args.source, token) + piece;
  const std::int64_t bytes = job.args.source.row_bytes - piece;
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) {
    const int at = (j * kLanes + lane_index()) * 16;
    v[j] = at < bytes ? load_16(row + at, job.row_width) : int4{};
  }
}

__device__ void quantise_piece(const MoveJob& job, std::int32_t token, int piece, int4 (&v)[kUnroll], PieceStage& stage) {
  const int blocks = (job.args.source.hidden_size + kQuantiseBlock - 1) / kQuantiseBlock;
  const int first = piece / kQuantiseBlock;
  __syncwarp();  // the last piece has been read
  quantise_blocks(job, token, {.base = first, .first = first, .end = min(blocks, first + kPieceBlocks)}, {stage.elements, stage.scales});
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) v[j] = reinterpret_cast<const int4*>(stage.elements)[j * kLanes + lane_index()];
}

template <bool kQuantise>
__device__ void move_row(const MoveJob& job, std::int32_t token, const Targets& targets, PieceStage* stage) {
  const SourceArgs& source = job.args.source;
  const int start = start_lane(job.args.context, token, targets.first_rank);
  for (std::int64_t piece = 0; piece < source.row_bytes; piece += kPieceBytes) {
    int4 v[kUnroll];
    if constexpr (kQuantise) {
      quantise_piece(job, token, static_cast<int>(piece), v, *stage);
      const int first = static_cast<int>(piece) / kQuantiseBlock;
      const int blocks = min(kPieceBlocks, (source.hidden_size + kQuantiseBlock - 1) / kQuantiseBlock - first);
      move_staged_scales(targets, stage->scales, quantised_scale_bytes(source.format, blocks) / 4,
                         quantised_scale_bytes(source.format, first));
    } else {
      load_piece(job, token, piece, v);
    }
    const std::int64_t bytes = source.row_bytes - piece;
    for_each_lane(targets.present, start, [&](int lane) {
      std::byte* to = of_lane(targets.row, lane) + piece;
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int at = (j * kLanes + lane_index()) * 16;
        if (at < bytes) ptx::store_streaming(to + at, v[j]);
      }
    });
  }
}

template <bool kQuantise>
__device__ void move_rows(const MoveJob& job) {
  extern __shared__ PieceStage stages[];
  const Context& c = job.args.context;
  const std::int32_t tokens = tokens_of(job.args);
  for (Pieces next(&c.tickets[kRowsTicket], mover_share()); next.current() < tokens; next.advance()) {
    const auto token = static_cast<std::int32_t>(next.current());
    for (int first = 0; first < c.ranks; first += kLanes) {
      move_row<kQuantise>(job, token, targets_of(job, token, first), kQuantise ? &stages[warp_index()] : nullptr);
    }
  }
}

template <bool kQuantise>
__global__ void __launch_bounds__(kVectorThreads, 1) move_rows_vector(const __grid_constant__ MoveJob job) {
  __shared__ PlanMemory plan;
  if (begin_move(job.args, plan, [] {})) {
    if (is_mover()) {
      move_rows<kQuantise>(job);
    } else {
      work_beside_rows(job, clerk_share());
    }
  }
  finish_move(job);
}

const Preloaded preloaded({{move_rows_vector<false>}, {move_rows_vector<true>, kAllSharedMemory}});

}  // namespace

void launch_move_vector(const MoveJob& job, Stream stream) {
  const bool quantise = job.args.source.quantise;
  constexpr std::size_t kShared = kMovers * sizeof(PieceStage);
  const Launch launch(job.args.blocks, kVectorThreads, quantise ? kShared : 0, stream, Resident::together);
  launch(quantise ? move_rows_vector<true> : move_rows_vector<false>, job);
}

}  // namespace tokenyard::cuda
