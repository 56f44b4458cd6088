// A combine by pull through shared memory: every thread has copies of the next chunks of partial sums under way while it adds up
// those that are here. What is under way at once is bounded by shared memory, not by registers.

#include "kernels/cuda/combine_pull.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kColumns = 4;  // vectors of a chunk per lane
constexpr int kChunkVectors = kColumns * kLanes;
constexpr int kSlots = 6;   // chunks of a warp
constexpr int kPieces = 8;  // that are under way, of a warp
constexpr int kWarps = kCombineThreads / kLanes;

// Shared memory: the list of every warp (an int4 an entry), then the chunks of every warp.
__host__ __device__ constexpr std::int64_t list_entries(int ranks) { return std::int64_t{kWarps} * ranks; }
std::int64_t shared_bytes(int ranks) {
  return list_entries(ranks) * kVectorBytes + std::int64_t{kWarps} * kSlots * kChunkVectors * kVectorBytes;
}

// A piece, as all lanes see it.
struct PulledPiece {
  std::int32_t token;
  int begin, end;  // vectors
  int terms;
};
// Of one warp.
struct PullMemory {
  int4* chunks;         // [kSlots][kChunkVectors]; a lane reads what it has copied, and nothing else
  PulledPiece* pieces;  // [kPieces]
};

// What a warp pulls, in order: pieces of tokens, of each the chunks, of each the terms. The same in all lanes.
class Pulls {
 public:
  __device__ Pulls(const CombineArgs& args, const PullMemory& memory)
      : args_(args), memory_(memory), next_(&args.context.tickets[kCombinePieces]) {
    const std::int64_t tokens = min(static_cast<std::int64_t>(args.handle.header->num_tokens), args.context.shape.max_tokens_per_rank);
    cut_ = RowCut::of(tokens, grid_warps(), static_cast<int>(row_bytes(args) / kVectorBytes));
    count_ = tokens * cut_.segments;
  }

  // Lists the terms of the next piece, which needs no peer. False: there is none.
  __device__ bool look_ahead() {
    if (is_listed_ || next_.current() >= count_) return is_listed_;
    const SumPiece piece = prepare_piece(args_, cut_, next_.current(), list());
    vector_ = piece.begin - lane_index();
    term_ = 0;
    if (lane_index() == 0) memory_.pieces[listed_ % kPieces] = {piece.token, vector_, piece.end, piece.terms};
    __syncwarp();
    ++listed_;
    return is_listed_ = true;
  }
  __device__ PulledPiece listed() const { return memory_.pieces[(listed_ - 1) % kPieces]; }
  // The listed piece has no terms.
  __device__ void skip() {
    --listed_;
    next_piece();
  }

  __device__ bool has_room() const { return issued_ - used_ < kSlots; }
  // Starts the next copy. When all are, a slot without one is a group of copies, too: so the oldest group is always as far away.
  __device__ void copy_next() {
    if (is_listed_) copy_chunk();
    ptx::commit_copies();
    ++issued_;
  }

  // The oldest piece that is not finished.
  __device__ bool any() const { return done_ != listed_; }
  __device__ PulledPiece piece() const { return memory_.pieces[done_ % kPieces]; }
  __device__ void finish_piece() { ++done_; }

  // This lane's vectors of the next chunk, once they are here.
  __device__ void take(int4 (&vectors)[kColumns]) {
    ptx::wait_copies<kSlots - 1>();
    const int4* const from = slot(used_++);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) vectors[c] = from[c * kLanes];
  }

 private:
  __device__ WarpLists list() const { return {.begin = warp_index() * args_.context.ranks, .ranks = args_.context.ranks}; }
  __device__ int4* slot(unsigned n) const { return memory_.chunks + n % kSlots * kChunkVectors + lane_index(); }
  __device__ void next_piece() {
    is_listed_ = false;
    next_.advance();
  }
  __device__ void copy_chunk() {
    const PulledPiece piece = listed();
    const std::byte* const row = list().term(term_).row;
    int4* const to = slot(issued_);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int vector = vector_ + lane_index() + c * kLanes;
      if (vector < piece.end) ptx::copy_async(to + c * kLanes, row + static_cast<std::int64_t>(vector) * kVectorBytes);
    }
    if (++term_ < piece.terms) return;
    term_ = 0;
    vector_ += kChunkVectors;
    if (vector_ >= piece.end) next_piece();
  }

  const CombineArgs& args_;
  const PullMemory memory_;
  RowCut cut_;
  std::int64_t count_ = 0;  // of all pieces
  Pieces next_;             // the piece to load from; when listed, the last of memory_.pieces
  bool is_listed_ = false;
  int vector_ = 0;                  // of its next chunk
  int term_ = 0;                    // of its next load
  unsigned listed_ = 0, done_ = 0;  // pieces
  unsigned issued_ = 0, used_ = 0;  // chunks
};

// One chunk of a token's sum.
template <Dtype kDtype>
struct ChunkSum {
  Floats<kDtype> sums[kColumns];

  __device__ __forceinline__ void begin(const SumRow& row, int vector, int end) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int at = vector + c * kLanes;
      sums[c] = at < end ? bias_vector<kDtype>(row.bias0, at) : Floats<kDtype>::zero();
      if (at < end) sums[c].add(bias_vector<kDtype>(row.bias1, at));
    }
  }
  __device__ __forceinline__ void add(const int4 (&values)[kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[c].add(Floats<kDtype>::of(values[c]));
  }
  __device__ __forceinline__ void store(const SumRow& row, int vector, int end) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (vector + c * kLanes < end) store_sums(row.out, vector + c * kLanes, sums[c].at, row.out_dtype);
    }
  }
};

// take(sum) adds the terms of a chunk.
template <Dtype kDtype, class Take>
__device__ __forceinline__ void sum_piece(const CombineArgs& args, const PulledPiece& piece, Take&& take) {
  const SumRow row = SumRow::of(args, piece.token);
#pragma unroll 1
  for (int vector = piece.begin + lane_index(); vector < piece.end + lane_index(); vector += kChunkVectors) {
    ChunkSum<kDtype> sum;
    sum.begin(row, vector, piece.end);
    take(sum);
    sum.store(row, vector, piece.end);
  }
}

template <Dtype kDtype>
__device__ __forceinline__ void refill(const CombineArgs& args, Pulls& pulls) {
  while (pulls.has_room()) {
    while (pulls.look_ahead() && pulls.listed().terms == 0) {
      sum_piece<kDtype>(args, pulls.listed(), [](auto&) {});
      pulls.skip();
    }
    pulls.copy_next();
  }
}

template <Dtype kDtype>
__device__ void sum_pulls(const CombineArgs& args, Pulls& pulls) {
  for (refill<kDtype>(args, pulls); pulls.any(); pulls.finish_piece()) {
    const PulledPiece piece = pulls.piece();
    sum_piece<kDtype>(args, piece, [&](ChunkSum<kDtype>& sum) {
#pragma unroll 1
      for (int term = 0; term < piece.terms; ++term) {
        int4 values[kColumns];
        pulls.take(values);
        refill<kDtype>(args, pulls);
        sum.add(values);
      }
    });
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_pull_async(const __grid_constant__ CombineArgs args) {
  extern __shared__ int4 combine_lists[];
  __shared__ PulledPiece pieces[kWarps][kPieces];
  int4* const chunks = combine_lists + list_entries(args.context.ranks) + warp_index() * kSlots * kChunkVectors;
  Pulls pulls(args, {chunks, pieces[warp_index()]});
  pulls.look_ahead();
  if (begin_pull(args)) sum_pulls<kDtype>(args, pulls);
  finish_pull(args.context);
}

const Preloaded preloaded({{combine_pull_async<Dtype::float32>, kAllSharedMemory},
                           {combine_pull_async<Dtype::bfloat16>, kAllSharedMemory},
                           {combine_pull_async<Dtype::float16>, kAllSharedMemory}});

}  // namespace

bool launch_combine_pull_async(const CombineArgs& args, Stream stream) {
  const std::int64_t bytes = shared_bytes(args.context.ranks);
  if (args.groups != nullptr || args.out == nullptr || bytes > most_shared_bytes()) return false;
  const Launch launch(args.blocks, kCombineThreads, static_cast<std::size_t>(bytes), stream, Resident::any);
  visit_combined(args.dtype, [&](auto dtype) { launch(combine_pull_async<dtype.value>, args); });
  return true;
}

}  // namespace tokenyard::cuda
