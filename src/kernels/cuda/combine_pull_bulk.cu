// A combine by pull through shared memory: every warp has bulk loads of the next chunks of partial sums under way while it adds
// up those that are here. What is under way at once is bounded by shared memory, not by registers.

#include "kernels/cuda/bulk.cuh"
#include "kernels/cuda/combine_pull.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kColumns = 4;  // vectors of a chunk per lane
constexpr int kChunkVectors = kColumns * kLanes;
constexpr int kChunkBytes = kChunkVectors * kVectorBytes;
constexpr int kSlots = 6;   // chunks of a warp
constexpr int kPieces = 8;  // that are under way, of a warp
constexpr int kWarps = kCombineThreads / kLanes;
constexpr int kMostRanks = 64;  // whose lists fit beside the chunks

// Shared memory: the list of every warp (an int4 an entry), then the chunks of every warp.
__host__ __device__ constexpr std::int64_t list_entries(int ranks) { return std::int64_t{kWarps} * ranks; }
std::int64_t shared_bytes(int ranks) { return list_entries(ranks) * kVectorBytes + std::int64_t{kWarps} * kSlots * kChunkBytes; }

// What a warp pulls, in order: pieces of tokens, of each the chunks, of each the terms. The same in all lanes.
class Pulls {
 public:
  __device__ Pulls(const CombineArgs& args, std::byte* chunks, bulk::Barrier* barriers)
      : args_(args), chunks_(chunks), barriers_(barriers), next_(grid_warp()) {
    const std::int64_t tokens = min(static_cast<std::int64_t>(args.handle.header->num_tokens), args.context.shape.max_tokens_per_rank);
    cut_ = RowCut::of(tokens, grid_warps(), static_cast<int>(row_bytes(args) / kVectorBytes));
    count_ = tokens * cut_.segments;
    if (lane_index() == 0) {
      for (int slot = 0; slot < kSlots; ++slot) barriers_[slot].init(1);
      bulk::publish_barriers();
    }
    __syncwarp();
  }

  // Lists the terms of the next piece, which needs no peer. False: there is none, or no room to remember it.
  __device__ bool look_ahead() {
    if (is_listed_) return true;
    if (next_ >= count_ || listed_ - done_ == kPieces) return false;
    SumPiece& piece = pieces_[listed_++ % kPieces];
    piece = prepare_piece(args_, cut_, next_, list());
    vector_ = first_vector(piece);
    term_ = 0;
    is_listed_ = true;
    return true;
  }

  // Starts loads until all slots are taken.
  __device__ void refill() {
    while (issued_ - used_ < kSlots && look_ahead()) {
      const SumPiece& piece = pieces_[(listed_ - 1) % kPieces];
      if (piece.terms != 0) {
        if (lane_index() == 0) load(list().term(term_).row, min(kChunkVectors, piece.end - vector_) * kVectorBytes);
        ++issued_;
        if (++term_ < piece.terms) continue;
        term_ = 0;
        vector_ += kChunkVectors;
        if (vector_ < piece.end) continue;
      }
      is_listed_ = false;
      next_ += grid_warps();
    }
  }

  // The oldest piece that is not finished.
  __device__ bool any() const { return done_ != listed_; }
  __device__ const SumPiece& piece() const { return pieces_[done_ % kPieces]; }
  __device__ void finish_piece() { ++done_; }
  static __device__ int first_vector(const SumPiece& piece) { return piece.begin - lane_index(); }

  // This lane's vectors of the next chunk, once it is here.
  __device__ void take(int4 (&vectors)[kColumns]) {
    const unsigned slot = used_ % kSlots;
    barriers_[slot].wait(used_ / kSlots & 1);
    const auto* const from = reinterpret_cast<const int4*>(chunks_ + slot * kChunkBytes) + lane_index();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) vectors[c] = from[c * kLanes];
    __syncwarp();  // all lanes have read the slot
    ++used_;
  }

 private:
  __device__ WarpLists list() const { return {.begin = warp_index() * args_.context.ranks, .ranks = args_.context.ranks}; }
  __device__ void load(const std::byte* row, int bytes) {
    const unsigned slot = issued_ % kSlots;
    barriers_[slot].expect(bytes);
    bulk::load(chunks_ + slot * kChunkBytes, row + static_cast<std::int64_t>(vector_) * kVectorBytes, bytes, barriers_[slot]);
  }

  const CombineArgs& args_;
  std::byte* chunks_;
  bulk::Barrier* barriers_;
  RowCut cut_;
  std::int64_t count_ = 0;  // of all pieces
  std::int64_t next_;       // the piece to load from; when listed, the last of pieces_
  bool is_listed_ = false;
  int vector_ = 0;  // of its next chunk
  int term_ = 0;    // of its next load
  SumPiece pieces_[kPieces];
  unsigned listed_ = 0, done_ = 0;  // pieces
  unsigned issued_ = 0, used_ = 0;  // chunks
};

// One chunk of a token's sum.
template <Dtype kDtype>
__device__ __forceinline__ void sum_chunk(Pulls& pulls, const SumRow& row, int terms, int vector, int end) {
  Floats<kDtype> sums[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int at = vector + c * kLanes;
    sums[c] = at < end ? bias_vector<kDtype>(row.bias0, at) : Floats<kDtype>::zero();
    if (at < end) sums[c].add(bias_vector<kDtype>(row.bias1, at));
  }
#pragma unroll 1
  for (int term = 0; term < terms; ++term) {
    int4 values[kColumns];
    pulls.take(values);
    pulls.refill();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[c].add(Floats<kDtype>::of(values[c]));
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (vector + c * kLanes < end) store_sums(row.out, vector + c * kLanes, sums[c].at, row.out_dtype);
  }
}

template <Dtype kDtype>
__device__ void sum_pulls(const CombineArgs& args, Pulls& pulls) {
  for (pulls.refill(); pulls.any(); pulls.refill()) {
    const SumPiece piece = pulls.piece();
    const SumRow row = SumRow::of(args, piece.token);
    for (int vector = Pulls::first_vector(piece); vector < piece.end; vector += kChunkVectors) {
      sum_chunk<kDtype>(pulls, row, piece.terms, vector + lane_index(), piece.end);
    }
    pulls.finish_piece();
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_pull_bulk(const __grid_constant__ CombineArgs args) {
  extern __shared__ int4 combine_lists[];
  __shared__ bulk::Barrier barriers[kWarps][kSlots];
  auto* const chunks = reinterpret_cast<std::byte*>(combine_lists + list_entries(args.context.ranks));
  Pulls pulls(args, chunks + warp_index() * kSlots * kChunkBytes, barriers[warp_index()]);
  pulls.look_ahead();
  if (begin_pull(args)) sum_pulls<kDtype>(args, pulls);
  finish_pull(args.context);
}

const Preloaded preloaded({{combine_pull_bulk<Dtype::float32>, kAllSharedMemory},
                           {combine_pull_bulk<Dtype::bfloat16>, kAllSharedMemory},
                           {combine_pull_bulk<Dtype::float16>, kAllSharedMemory}});

}  // namespace

bool launch_combine_pull_bulk(const CombineArgs& args, Stream stream) {
  if (args.context.ranks > kMostRanks || args.groups != nullptr || args.out == nullptr || !has_bulk_copies()) return false;
  const Launch launch(args.blocks, kCombineThreads, static_cast<std::size_t>(shared_bytes(args.context.ranks)), stream, Resident::any);
  visit_combined(args.dtype, [&](auto dtype) { launch(combine_pull_bulk<dtype.value>, args); });
  return true;
}

}  // namespace tokenyard::cuda
