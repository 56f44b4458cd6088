#pragma once
// What the kernels of a combine share: how they begin, the rows of y that belong to a received row, and their fold.

#include <algorithm>

#include "core/preload.h"
#include "kernels/cuda/block.cuh"
#include "kernels/cuda/combine_arithmetic.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numbers.cuh"

namespace tokenyard::cuda {

// One block fills a multiprocessor: what is under way at once is bounded by registers, of which every thread may have 128.
constexpr int kCombineThreads = 512;
constexpr int kStepBytes = kLanes * kVectorBytes;  // what a warp reads of a row at once

// Tickets of is_last_block.
enum CombineTicket { kCombineEnd, kCombinePushed };

// In every block of a call's first kernel: block 0 announces it. Block-uniform.
__device__ inline CallState announce_combine(const CombineArgs& args) {
  const Context& c = args.context;
  CallState state = state_of_call(c);
  if (state.failed || blockIdx.x != 0) return state;
  state.failed = !begin_call(c, complete_header(args.header, args.handle), protocol::offer(protocol::kNoBuffer), state);
  return state;
}
// The last block has the least to do: it checks, and tells how long it has waited.
__device__ inline bool is_last_to_wait(const CombineArgs& args) { return static_cast<int>(blockIdx.x) == args.blocks - 1; }

// Then, before the block needs peers: they have begun the same call, and their arenas may be written. Block-uniform.
__device__ inline bool meet_peers(const CombineArgs& args, const CallState& state) {
  if (state.failed) return false;
  const protocol::CallHeader header = complete_header(args.header, args.handle);
  return wait_for_peers(args.context, header, Phase::combine_credit, state.call, is_last_to_wait(args));
}
__device__ inline CallState begin_combine(const CombineArgs& args) {
  CallState state = announce_combine(args);
  state.failed = !meet_peers(args, state);
  return state;
}

// In every block of the kernel that folds. at_source: combine_weights came before it and has begun the call. Block-uniform.
__device__ inline CallState begin_push(const CombineArgs& args) {
  if (args.weighting != Weighting::at_source) return begin_combine(args);
  CallState state = state_of_call(args.context);
  state.failed = state.failed || !wait_for_all(args.context, Flag::weights, Phase::combine_weights, state.call, is_last_to_wait(args));
  return state;
}

// The lists of one warp, in shared memory.
struct Term {                      // a partial sum of a token
  const std::byte* row = nullptr;  // null: this rank's own, which is still to be folded
  std::int32_t group = 0;
  std::int32_t rank = 0;
};
struct Leaf {                      // a row of y in the fold of a received row
  const std::byte* row = nullptr;  // null: dropped, its partial sum is zero (unfolded)
  float weight = 1.0F;
  std::int32_t slot = 0;  // unfolded: of staging, where it goes
};
static_assert(sizeof(Term) == sizeof(Leaf));

// Terms [ranks], then leaves [top_k]. An index instead of pointers, so that the compiler sees shared memory everywhere.
struct WarpLists {
  int begin = 0;  // of the terms, in entries
  int ranks = 0;

  static constexpr TY_HOST_DEVICE int entries(const CombineArgs& args) { return args.context.ranks + args.handle.top_k; }
  __device__ static WarpLists mine(const CombineArgs& args) { return {.begin = warp_index() * entries(args), .ranks = args.context.ranks}; }
  __device__ __forceinline__ Term& term(int n) const { return reinterpret_cast<Term*>(memory())[begin + n]; }
  __device__ __forceinline__ Leaf& leaf(int n) const { return reinterpret_cast<Leaf*>(memory())[begin + ranks + n]; }

 private:
  __device__ __forceinline__ static int4* memory() {
    extern __shared__ int4 combine_lists[];
    return combine_lists;
  }
};

__device__ __forceinline__ bool is_expert_layout(const CombineArgs& args) {
  return args.layout == Layout::expert_major || args.layout == Layout::expert_padded;
}
// Token layouts: the row of y, a partial sum already, of received row i.
__device__ __forceinline__ std::int64_t token_row(const CombineArgs& args, std::int64_t i) {
  return args.layout == Layout::token_major && args.mode == Mode::latency ? args.handle.output_row[i] : i;
}
__device__ __forceinline__ const std::byte* y_row(const CombineArgs& args, std::int64_t row) { return args.y + row * args.y_pitch; }
__device__ __forceinline__ std::int64_t row_bytes(const CombineArgs& args) {
  return static_cast<std::int64_t>(args.elements) * (args.dtype == Dtype::float32 ? 4 : 2);
}

// The weight of received row i in the fold for its k-th expert; unweighted terms weigh 1: fma(1, y, acc) is acc + y to the bit.
__device__ __forceinline__ float term_weight(const CombineArgs& args, std::int64_t i, int k) {
  if (args.weighting == Weighting::at_expert) return args.handle.weights[i * args.handle.top_k + k];
  if (args.weighting == Weighting::at_source) return weights_in(args.context, args.context.rank)[i * args.context.shape.top_k + k];
  return 1.0F;
}

// What the caller wants returned for (i, k); 0 where the row was dropped.
__device__ __forceinline__ float returned_weight(const CombineArgs& args, std::int64_t i, int k) {
  const int top_k = args.handle.top_k;
  if (!is_expert_layout(args)) return args.row_weights[token_row(args, i) * top_k + k];
  const std::int32_t row = args.handle.output_row[i * top_k + k];
  return row < 0 ? 0.0F : args.row_weights[row];
}

// Lists the rows of y of received row i in order of k, by the whole warp: with args.fold those that exist, else also those
// that were dropped. Returns how many.
__device__ inline int list_leaves(const CombineArgs& args, std::int64_t i, const WarpLists& lists) {
  const int top_k = args.handle.top_k;
  const std::int32_t* rows = args.handle.output_row + i * top_k;
  const std::int32_t* local_ids = args.handle.local_ids + i * top_k;
  const int lane = lane_index();
  __syncwarp();  // all lanes have read the last list
  int count = 0;
#pragma unroll 1
  for (int first = 0; first < top_k; first += kLanes) {
    const int k = first + lane;
    Leaf leaf;
    bool is_there = false;
    if (k < top_k) {
      const std::int32_t row = rows[k];
      is_there = args.fold ? row >= 0 : local_ids[k] >= 0;
      if (row >= 0) leaf.row = y_row(args, row);
      if (is_there) leaf.weight = term_weight(args, i, k);
      if (is_there && !args.fold) {
        const std::int32_t token = args.handle.source_token[i];
        leaf.slot = static_cast<std::int32_t>(unfolded_slot(args.context.shape, token, k, args.shard_ordinals[local_ids[k]]));
      }
    }
    const unsigned found = __ballot_sync(kAllLanes, is_there);
    if (is_there) lists.leaf(count + __popc(found & lanes_below())) = leaf;
    count += __popc(found);
  }
  __syncwarp();
  return count;
}

// Calls step(constant n, first) for [begin, end) in batches: of kMost, then one of what is left. Each size is code of its own,
// without conditions between its loads.
template <int kMost = 4, class Step>
__device__ __forceinline__ void for_each_batch(int begin, int end, Step&& step) {
  static_assert(kMost <= 4, "a case for each rest");
  int first = begin;
#pragma unroll 1
  for (; first + kMost <= end; first += kMost) step(std::integral_constant<int, kMost>(), first);
  const int rest = end - first;
  if (kMost > 3 && rest == 3) step(std::integral_constant<int, 3>(), first);
  if (kMost > 2 && rest == 2) step(std::integral_constant<int, 2>(), first);
  if (rest == 1) step(std::integral_constant<int, 1>(), first);
}

// The fold of leaves [begin, end), none of them dropped, in kColumns vectors of a row that lie kLanes apart: from +0, rounded.
template <Dtype kDtype, bool kAligned, int kColumns>
__device__ __forceinline__ void fold_columns(const WarpLists& lists, int begin, int end, int vector, int4 (&folded)[kColumns]) {
  const std::int64_t offset = static_cast<std::int64_t>(vector) * kVectorBytes;
  Floats<kDtype> sums[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) sums[c] = Floats<kDtype>::zero();
  for_each_batch(begin, end, [&](auto size, int first) {
    int4 rows[size.value][kColumns];
#pragma unroll
    for (int j = 0; j < size.value; ++j) {
      const std::byte* const row = lists.leaf(first + j).row + offset;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) rows[j][c] = load_vector<kAligned>(row + c * kStepBytes);
    }
#pragma unroll
    for (int j = 0; j < size.value; ++j) {
      const float weight = lists.leaf(first + j).weight;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[c].add_product(weight, Floats<kDtype>::of(rows[j][c]));
    }
  });
#pragma unroll
  for (int c = 0; c < kColumns; ++c) folded[c] = sums[c].packed();
}

// ---- on the host ----

inline bool is_aligned_pitch(const void* data, std::int64_t pitch) {
  return reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0 && pitch % kVectorBytes == 0;
}

// Of one warp.
inline std::int64_t list_bytes(const CombineArgs& args) { return static_cast<std::int64_t>(sizeof(Term)) * WarpLists::entries(args); }
// As many threads as their lists fit into the shared memory that needs no asking for, beside the kernels' few variables.
inline int combine_threads(const CombineArgs& args) {
  constexpr std::int64_t kSharedBytes = 47 * 1024;
  const std::int64_t warps = kSharedBytes / list_bytes(args);
  return static_cast<int>(std::clamp<std::int64_t>(warps, 1, kCombineThreads / kLanes)) * kLanes;
}

// Calls visitor(constant of the dtype) with one of the three that this folder adds up.
template <class Visitor>
void visit_combined(Dtype dtype, Visitor&& visitor) {
  if (dtype == Dtype::float32) {
    visitor(std::integral_constant<Dtype, Dtype::float32>());
  } else if (dtype == Dtype::float16) {
    visitor(std::integral_constant<Dtype, Dtype::float16>());
  } else {
    visitor(std::integral_constant<Dtype, Dtype::bfloat16>());
  }
}
// ... and with whether every row of y lies on 16 bytes.
template <class Visitor>
void visit_combined(const CombineArgs& args, Visitor&& visitor) {
  visit_combined(args.dtype, [&](auto dtype) {
    if (is_aligned_pitch(args.y, args.y_pitch)) {
      visitor(dtype, std::true_type());
    } else {
      visitor(dtype, std::false_type());
    }
  });
}

struct CombineLaunch : Launch {
  CombineLaunch(const CombineArgs& args, Stream stream, Resident resident, int more_blocks = 0)
      : Launch(args.blocks + more_blocks, combine_threads(args),
               static_cast<std::size_t>(combine_threads(args) / kLanes * list_bytes(args)), stream, resident) {}
};

}  // namespace tokenyard::cuda
