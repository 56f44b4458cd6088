#pragma once
// The work of a sum, by all warps of a grid: the partial sums of every token of this rank are added up in the order that
// the call asks for, whether they lie in this rank's staging, in the peers' expert rows or, its own, in out.

#include "kernels/cuda/combine_parts.cuh"

namespace tokenyard::cuda {

// A piece of a token's sum, as one warp works on it.
struct SumPiece {
  std::int32_t token = 0;
  std::int32_t own = -1;   // the received row of this rank's own copy of the token; -1: none
  int begin = 0, end = 0;  // vectors; begin is this lane's
  int terms = 0;
  int leaves = 0;  // of this rank's own partial sum, when it is to be folded
};

__device__ __forceinline__ TokenRoute route_of(const CombineArgs& args, std::int64_t token) {
  const int ranks = args.context.ranks;
  return {.slots = args.handle.slots + token * ranks,
          .k_masks = args.handle.k_masks + token * ranks,
          .groups = args.groups,
          .ranks = ranks,
          .order = args.fold ? args.order : Order::rank_ascending};
}

// Whether this rank's own partial sums are still to be folded.
__device__ __forceinline__ bool folds_own(const CombineArgs& args) { return is_expert_layout(args) && args.own_blocks == 0; }

// Where this rank's own partial sum of a token lies. Null: it is still to be folded.
__device__ __forceinline__ const std::byte* own_partial(const CombineArgs& args, std::int64_t token, std::int64_t slot) {
  if (folds_own(args)) return nullptr;
  return is_expert_layout(args) ? args.out + token * args.out_pitch : y_row(args, token_row(args, slot));
}
// Where that of another rank lies.
__device__ __forceinline__ const std::byte* partial_of(const CombineArgs& args, std::int64_t slot, std::int64_t staged, int rank) {
  const Context& c = args.context;
  return args.pull ? expert_rows(c, rank) + slot * row_bytes(args) : staging(c, c.rank) + staged * row_bytes(args);
}

// Lists the partial sums of a token in the order in which they are added, by the whole warp.
__device__ inline void list_terms(const CombineArgs& args, SumPiece& piece, const WarpLists& lists) {
  const Context& c = args.context;
  const TokenRoute route = route_of(args, piece.token);
  const bool is_ascending = route.order == Order::rank_ascending && args.groups == nullptr;
  const int lane = lane_index();
  __syncwarp();  // all lanes have read the last list
  int served = 0, away = 0;
  piece.own = route.slots[c.rank];
  for (int first = 0; first < c.ranks; first += kLanes) {
    const int rank = first + lane;
    const std::int32_t slot = rank < c.ranks ? route.slots[rank] : -1;
    const unsigned found = __ballot_sync(kAllLanes, slot >= 0);
    const unsigned others = __ballot_sync(kAllLanes, slot >= 0 && rank != c.rank);
    if (slot >= 0) {
      const int place = is_ascending ? served + __popc(found & lanes_below()) : route.place_of(rank);
      const std::int64_t staged = folded_slot(c.shape, piece.token, away + __popc(others & lanes_below()));
      const std::byte* const row = rank == c.rank ? own_partial(args, piece.token, slot) : partial_of(args, slot, staged, rank);
      lists.term(place) = {.row = row, .group = route.group_of(rank), .rank = rank};
    }
    served += __popc(found);
    away += __popc(others);
  }
  piece.terms = served;
  __syncwarp();
}

__device__ inline SumPiece prepare_piece(const CombineArgs& args, const RowCut& cut, std::int64_t n, const WarpLists& lists) {
  const int vectors = args.out != nullptr ? static_cast<int>(row_bytes(args) / kVectorBytes) : 0;
  SumPiece piece;
  piece.token = static_cast<std::int32_t>(n / cut.segments);
  const int segment = static_cast<int>(n - static_cast<std::int64_t>(piece.token) * cut.segments);
  piece.begin = segment * cut.length + lane_index();
  piece.end = min(vectors, (segment + 1) * cut.length);
  if (args.out == nullptr) return piece;
  list_terms(args, piece, lists);
  if (piece.own >= 0 && folds_own(args) && args.fold) piece.leaves = list_leaves(args, piece.own, lists);
  return piece;
}

// What belongs to a token beside its partial sums.
struct SumRow {
  const std::byte* bias0 = nullptr;  // of the token; null: none
  const std::byte* bias1 = nullptr;
  std::byte* out = nullptr;
  Dtype out_dtype = Dtype::bfloat16;

  __device__ static SumRow of(const CombineArgs& args, std::int64_t token) {
    return {.bias0 = args.bias0 != nullptr ? args.bias0 + token * args.bias0_pitch : nullptr,
            .bias1 = args.bias1 != nullptr ? args.bias1 + token * args.bias1_pitch : nullptr,
            .out = args.out + token * args.out_pitch,
            .out_dtype = args.out_dtype};
  }
};

template <Dtype kDtype>
__device__ __forceinline__ Floats<kDtype> bias_vector(const std::byte* row, int vector) {
  if (row == nullptr) return Floats<kDtype>::zero();
  return Floats<kDtype>::of(load_vector<false>(row + static_cast<std::int64_t>(vector) * kVectorBytes));
}

// The sums of the vectors of a token that lie kLanes apart; groups of terms are rounded before they are added.
template <Dtype kDtype, int kColumns, bool kGrouped>
struct ColumnSums {
  Floats<kDtype> sums[kColumns];
  Floats<kDtype> group_sums[kGrouped ? kColumns : 1];
  int group = -1;

  __device__ __forceinline__ void begin(const SumRow& row, int vector) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sums[c] = bias_vector<kDtype>(row.bias0, vector + c * kLanes);
      sums[c].add(bias_vector<kDtype>(row.bias1, vector + c * kLanes));
    }
  }
  __device__ __forceinline__ void add(int term_group, const int4 (&row)[kColumns]) {
    if constexpr (kGrouped) {
      if (term_group != group) {
        close_group();
#pragma unroll
        for (int c = 0; c < kColumns; ++c) group_sums[c] = Floats<kDtype>::zero();
        group = term_group;
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) (kGrouped ? group_sums : sums)[c].add(Floats<kDtype>::of(row[c]));
  }
  __device__ __forceinline__ void close_group() {
    if constexpr (kGrouped) {
      if (group < 0) return;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[c].add(Floats<kDtype>::of(group_sums[c].packed()));
    }
  }
  __device__ __forceinline__ void store(const SumRow& row, int vector) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) store_sums(row.out, vector + c * kLanes, sums[c].at, row.out_dtype);
  }
};

// The kinds of a sum. pulled: every term is a row as it lies. folded: this rank's own term is folded first (expert layouts).
enum class Sum : std::uint8_t { pulled, folded, grouped };

// counts: terms, leaves.
template <Dtype kDtype, bool kAligned, Sum kSum, int kColumns>
__device__ __forceinline__ void sum_columns(const SumRow& row, const WarpLists& lists, int2 counts, int vector) {
  constexpr bool kFolds = kSum != Sum::pulled;
  const std::int64_t offset = static_cast<std::int64_t>(vector) * kVectorBytes;
  int4 own[kColumns];
  if constexpr (kFolds) fold_columns<kDtype, kAligned, kColumns>(lists, 0, counts.y, vector, own);
  ColumnSums<kDtype, kColumns, kSum == Sum::grouped> sums;
  sums.begin(row, vector);
  for_each_batch<kColumns == 4 ? 2 : 4>(0, counts.x, [&](auto size, int first) {
    int4 rows[size.value][kColumns];
#pragma unroll
    for (int j = 0; j < size.value; ++j) {
      const std::byte* const from = lists.term(first + j).row;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        rows[j][c] = !kFolds || from != nullptr ? load_vector<kAligned>(from + offset + c * kStepBytes) : own[c];
      }
    }
#pragma unroll
    for (int j = 0; j < size.value; ++j) sums.add(lists.term(first + j).group, rows[j]);
  });
  sums.close_group();
  sums.store(row, vector);
}

template <Dtype kDtype, bool kAligned, Sum kSum>
__device__ __forceinline__ void sum_vectors(SumRow row, WarpLists lists, int2 counts, int vector, int end) {
  constexpr int kMany = kSum == Sum::grouped ? 1 : 2;
  if constexpr (kSum == Sum::pulled) {  // few terms: more columns at once instead
#pragma unroll 1
    for (; counts.x <= 2 && vector + 3 * kLanes < end; vector += 4 * kLanes) {
      sum_columns<kDtype, kAligned, kSum, 4>(row, lists, counts, vector);
    }
  }
#pragma unroll 1
  for (; vector + (kMany - 1) * kLanes < end; vector += kMany * kLanes) {
    sum_columns<kDtype, kAligned, kSum, kMany>(row, lists, counts, vector);
  }
  if (kMany > 1 && vector < end) sum_columns<kDtype, kAligned, kSum, 1>(row, lists, counts, vector);
}

// The partial sum of one (token, k) on this rank: one row, or +0 where it was dropped.
template <Dtype kDtype, bool kAligned>
__device__ __forceinline__ int4 own_unfolded(const CombineArgs& args, std::int64_t i, int k, int vector) {
  const std::int32_t row = args.handle.output_row[i * args.handle.top_k + k];
  Floats<kDtype> sum = Floats<kDtype>::zero();
  if (row >= 0) {
    const std::byte* const from = y_row(args, row) + static_cast<std::int64_t>(vector) * kVectorBytes;
    sum.add_product(term_weight(args, i, k), Floats<kDtype>::of(load_vector<kAligned>(from)));
  }
  return sum.packed();
}

// fold = false: every (token, k, shard) is a partial sum of its own; k ascending, ranks ascending within it.
template <Dtype kDtype, bool kAligned>
__device__ __forceinline__ void sum_unfolded(const CombineArgs& args, const SumPiece piece, WarpLists lists) {
  const Context& c = args.context;
  const TokenRoute route = route_of(args, piece.token);
  const SumRow out = SumRow::of(args, piece.token);
#pragma unroll 1
  for (int vector = piece.begin; vector < piece.end; vector += kLanes) {
    ColumnSums<kDtype, 1, false> sums;
    sums.begin(out, vector);
#pragma unroll 1
    for (int k = 0; k < args.handle.top_k; ++k) {
#pragma unroll 1
      for (int n = 0; n < piece.terms; ++n) {
        const int rank = lists.term(n).rank;
        if ((route.k_masks[rank] >> k & 1) == 0) continue;
        int4 row[1];
        if (rank == c.rank) {
          row[0] = own_unfolded<kDtype, kAligned>(args, piece.own, k, vector);
        } else {
          const std::int64_t slot = unfolded_slot(c.shape, piece.token, k, route.shard_of(rank, k));
          row[0] = load_vector<true>(staging(c, c.rank) + slot * row_bytes(args) + static_cast<std::int64_t>(vector) * kVectorBytes);
        }
        sums.add(0, row);
      }
    }
    sums.store(out, vector);
  }
}

template <Dtype kDtype, bool kAligned, bool kPull>
__device__ inline void sum_piece(const CombineArgs& args, const SumPiece& piece, const WarpLists& lists) {
  const int2 counts = make_int2(piece.terms, piece.leaves);
  if (!kPull && !args.fold) {
    sum_unfolded<kDtype, kAligned>(args, piece, lists);
  } else if (args.groups != nullptr) {
    sum_vectors<kDtype, kAligned, Sum::grouped>(SumRow::of(args, piece.token), lists, counts, piece.begin, piece.end);
  } else if (kPull || !folds_own(args) || piece.own < 0) {
    sum_vectors<kDtype, kAligned, Sum::pulled>(SumRow::of(args, piece.token), lists, counts, piece.begin, piece.end);
  } else {
    sum_vectors<kDtype, kAligned, Sum::folded>(SumRow::of(args, piece.token), lists, counts, piece.begin, piece.end);
  }
}

// combined[token][k]: what came back for it, ranks ascending.
__device__ inline void sum_weights(const CombineArgs& args, std::int64_t token) {
  const Context& c = args.context;
  const TokenRoute route = route_of(args, token);
  const int top_k = args.handle.top_k;
  for (int k = lane_index(); k < top_k; k += kLanes) {
    float sum = 0.0F;
    int away = 0;
    for (int rank = 0; rank < c.ranks; ++rank) {
      if (!route.is_served(rank)) continue;
      const bool is_own = rank == c.rank;
      const std::int64_t slot = folded_slot(c.shape, token, away);
      away += is_own ? 0 : 1;
      if ((route.k_masks[rank] >> k & 1) == 0) continue;
      sum += is_own ? returned_weight(args, route.slots[rank], k) : weights_back(c, c.rank)[slot * c.shape.top_k + k];
    }
    args.combined_weights[token * top_k + k] = sum;
  }
}

// By all threads of all blocks. ready: the block waits for the partial sums; what needs none of them is done before.
template <Dtype kDtype, bool kAligned, bool kPull, class Ready>
__device__ inline void sum_tokens(const CombineArgs& args, Ready&& ready) {
  const WarpLists lists = WarpLists::mine(args);
  const std::int64_t tokens = min(static_cast<std::int64_t>(args.handle.header->num_tokens), args.context.shape.max_tokens_per_rank);
  const int vectors = args.out != nullptr ? static_cast<int>(row_bytes(args) / kVectorBytes) : 0;
  const RowCut cut = RowCut::of(tokens, grid_warps(), vectors);
  const std::int64_t pieces = tokens * cut.segments;
  bool is_ready = false;
#pragma unroll 1
  for (std::int64_t next = grid_warp(); !is_ready || next < pieces; next += grid_warps()) {
    SumPiece piece;
    if (next < pieces) piece = prepare_piece(args, cut, next, lists);
    if (!is_ready && !ready()) return;
    is_ready = true;
    if (next >= pieces) return;
    if (args.combined_weights != nullptr && piece.begin < kLanes) sum_weights(args, piece.token);
    if (args.out != nullptr) sum_piece<kDtype, kAligned, kPull>(args, piece, lists);
  }
}

}  // namespace tokenyard::cuda
