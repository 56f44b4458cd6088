#pragma once
// The work of a push, by all warps of a grid: the partial sums of received rows go into the owners' staging slots, and the
// weights that the caller returns beside them.

#include "kernels/cuda/combine_parts.cuh"

namespace tokenyard::cuda {

// A received row of another rank's token.
struct AwayRow {
  std::int32_t i = -1;  // -1: none
  std::int32_t source = 0;
  std::int32_t slot = 0;  // the token's partial slot
};

// The most rows that one other source has, absent ones of latency mode included, by the whole block.
__device__ inline std::int64_t most_rows(const CombineArgs& args) {
  __shared__ int most;
  if (threadIdx.x == 0) most = 0;
  __syncthreads();
  for (int source = threadIdx.x; source < args.context.ranks; source += blockDim.x) {
    if (source != args.context.rank) atomicMax(&most, args.handle.source_begin[source + 1] - args.handle.source_begin[source]);
  }
  __syncthreads();
  return most;
}

__device__ inline AwayRow find_row(const CombineArgs& args, std::int64_t piece, int segments) {
  const AwayPiece at = AwayPiece::of(piece, segments, args.context.rank, args.context.ranks);
  const std::int64_t i = args.handle.source_begin[at.source] + at.row;
  if (i >= args.handle.source_begin[at.source + 1] || args.handle.source_token[i] < 0) return {};
  return {.i = static_cast<std::int32_t>(i), .source = at.source, .slot = args.handle.partial_slot[i]};
}

template <bool kAligned, int kColumns>
__device__ __forceinline__ void copy_columns(std::byte* to, const std::byte* from, int vector) {
  const std::int64_t offset = static_cast<std::int64_t>(vector) * kVectorBytes;
  int4 columns[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) columns[c] = load_vector<kAligned>(from + offset + c * kStepBytes);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) ptx::store_streaming(to + offset + c * kStepBytes, columns[c]);
}

// Vectors [vector, end) in steps of a warp.
template <bool kAligned>
__device__ __forceinline__ void copy_vectors(std::byte* to, const std::byte* from, int vector, int end) {
  constexpr int kMany = 4;
#pragma unroll 1
  for (; vector + (kMany - 1) * kLanes < end; vector += kMany * kLanes) copy_columns<kAligned, kMany>(to, from, vector);
#pragma unroll 1
  for (; vector < end; vector += kLanes) copy_columns<kAligned, 1>(to, from, vector);
}

template <Dtype kDtype, bool kAligned, int kColumns>
__device__ __forceinline__ void fold_away(const WarpLists& lists, int2 leaves, int vector, std::byte* to) {
  int4 folded[kColumns];
  fold_columns<kDtype, kAligned, kColumns>(lists, leaves.x, leaves.y, vector, folded);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    ptx::store_streaming(to + static_cast<std::int64_t>(vector) * kVectorBytes + c * kStepBytes, folded[c]);
  }
}

// leaves: [x, y) of the list.
template <Dtype kDtype, bool kAligned>
__device__ __forceinline__ void fold_vectors(WarpLists lists, int2 leaves, int vector, int end, std::byte* to) {
#pragma unroll 1
  for (; vector + kLanes < end; vector += 2 * kLanes) fold_away<kDtype, kAligned, 2>(lists, leaves, vector, to);
  if (vector < end) fold_away<kDtype, kAligned, 1>(lists, leaves, vector, to);
}

// One segment of a row, by a whole warp.
template <Dtype kDtype, bool kAligned>
__device__ inline void push_segment(const CombineArgs& args, const AwayRow& row, const RowCut& cut, int segment, const WarpLists& lists) {
  const std::int64_t bytes = row_bytes(args);
  const int vectors = static_cast<int>(bytes / kVectorBytes);
  const int begin = segment * cut.length + lane_index();
  const int end = min(vectors, (segment + 1) * cut.length);
  std::byte* const owner = staging(args.context, row.source);
  if (!is_expert_layout(args)) {
    copy_vectors<kAligned>(owner + row.slot * bytes, y_row(args, token_row(args, row.i)), begin, end);
    return;
  }
  const int count = list_leaves(args, row.i, lists);
  if (args.fold) {
    fold_vectors<kDtype, kAligned>(lists, make_int2(0, count), begin, end, owner + row.slot * bytes);
    return;
  }
#pragma unroll 1
  for (int n = 0; n < count; ++n) {
    const Leaf& leaf = lists.leaf(n);
    const int terms = leaf.row != nullptr ? 1 : 0;
    fold_vectors<kDtype, kAligned>(lists, make_int2(n, n + terms), begin, end, owner + leaf.slot * bytes);
  }
}

__device__ inline void return_weights(const CombineArgs& args, const AwayRow& row) {
  float* const to = weights_back(args.context, row.source) + row.slot * args.context.shape.top_k;
  for (int k = lane_index(); k < args.handle.top_k; k += kLanes) to[k] = returned_weight(args, row.i, k);
}

// By all threads of args.blocks.
template <Dtype kDtype, bool kAligned>
__device__ inline void push_rows(const CombineArgs& args) {
  const Context& c = args.context;
  const WarpShare pushers = WarpShare::among(0, args.blocks);
  if (blockIdx.x == 0 && warp_index() == 0) add_link_bytes(c, args.handle.rank_counts, args.header.row_bytes);
  const std::int64_t most = most_rows(args);
  if (c.ranks == 1 || most == 0) return;
  std::int64_t returned = 0;
  for (int source = 0; source < c.ranks; ++source) returned += source != c.rank ? args.handle.rank_counts[source] : 0;
  const int vectors = args.y != nullptr ? static_cast<int>(row_bytes(args) / kVectorBytes) : 0;
  const RowCut cut = RowCut::of(returned, pushers.count, vectors);
  const std::int64_t pieces = most * (c.ranks - 1) * cut.segments;
  const std::int64_t stride = pushers.count;
  const WarpLists lists = WarpLists::mine(args);
  // A warp looks up its next 32 pieces at once, one per lane: most of them may be absent rows.
  for (std::int64_t first = pushers.index; first < pieces; first += stride * kLanes) {
    const std::int64_t piece = first + stride * lane_index();
    const AwayRow mine = piece < pieces ? find_row(args, piece, cut.segments) : AwayRow{};
    for (unsigned found = __ballot_sync(kAllLanes, mine.i >= 0); found != 0; found &= found - 1) {
      const int lane = __ffs(static_cast<int>(found)) - 1;
      const AwayRow row = {.i = __shfl_sync(kAllLanes, mine.i, lane),
                           .source = __shfl_sync(kAllLanes, mine.source, lane),
                           .slot = __shfl_sync(kAllLanes, mine.slot, lane)};
      const int segment = static_cast<int>((first + stride * lane) % cut.segments);
      if (args.row_weights != nullptr && segment == 0) return_weights(args, row);
      if (args.y != nullptr) push_segment<kDtype, kAligned>(args, row, cut, segment, lists);
    }
  }
}

// By all threads of args.own_blocks: the partial sums of this rank's own rows, a token for each warp. They are of out's type, and lie
// there until the sum adds them up.
template <Dtype kDtype, bool kAligned>
__device__ inline void fold_own(const CombineArgs& args) {
  const Context& c = args.context;
  const WarpShare share = WarpShare::among(args.blocks, args.own_blocks);
  const WarpLists lists = WarpLists::mine(args);
  const int vectors = static_cast<int>(row_bytes(args) / kVectorBytes);
  const std::int64_t tokens = min(static_cast<std::int64_t>(args.handle.header->num_tokens), c.shape.max_tokens_per_rank);
#pragma unroll 1
  for (std::int64_t token = share.index; token < tokens; token += share.count) {
    const std::int32_t own = args.handle.slots[token * c.ranks + c.rank];
    if (own < 0) continue;
    const int count = list_leaves(args, own, lists);
    fold_vectors<kDtype, kAligned>(lists, make_int2(0, count), lane_index(), vectors, args.out + token * args.out_pitch);
  }
}

// All of a push but what tells of its end.
template <Dtype kDtype, bool kAligned>
__device__ inline CallState push(const CombineArgs& args) {
  const CallState state = begin_push(args);
  if (!state.failed) push_rows<kDtype, kAligned>(args);
  return state;
}

}  // namespace tokenyard::cuda
