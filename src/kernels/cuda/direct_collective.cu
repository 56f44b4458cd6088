// Collectives over peer memory. A lane has two blocks: one pushes chunks of this rank's rows into the staging memory of the others,
// one takes out what the others pushed, and copies it to its place or adds it up in rank order.

#include "kernels/cuda/direct_collective.h"

#include "core/preload.h"
#include "kernels/cuda/block.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ordered_sum.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kDirectThreads = 512;
constexpr int kDirectEnd = 0;  // ticket of is_last_block

using protocol::CollectiveHeader;
using protocol::LaneCut;

template <class Word>
__device__ __forceinline__ Word load_word(const std::byte* from) {
  return *reinterpret_cast<const Word*>(from);
}
template <>
__device__ __forceinline__ int4 load_word<int4>(const std::byte* from) {
  return ptx::load_streaming(from);
}

// The bytes of consecutive rows as one sequence, although rows may lie apart.
template <class Byte>
struct RowSequence {
  Byte* data;
  std::int64_t row_bytes, stride;

  __device__ bool is_dense() const { return row_bytes == stride; }
  __device__ Byte* at(std::int64_t offset) const {
    return is_dense() ? data + offset : data + offset / row_bytes * stride + offset % row_bytes;
  }
  // How many bytes lie behind each other from there on, `most` at most.
  __device__ std::int64_t run(std::int64_t offset, std::int64_t most) const {
    return is_dense() ? most : min(most, row_bytes - offset % row_bytes);
  }
};
template <class Byte>
__device__ __forceinline__ RowSequence<Byte> rows_of(const RowTable<Byte>& table, const RowRange& range, std::int64_t row_bytes) {
  return {table.data + range.first * table.stride, row_bytes, table.stride};
}
// A chunk in staging memory, addressed like the sequence of which it is a part.
template <class Byte>
__device__ __forceinline__ RowSequence<Byte> chunk_at(Byte* slot, std::int64_t begin) {
  return {slot - begin, 1, 1};
}

// All rows of one rank, and its place among those of all.
__device__ __forceinline__ RowRange counted(const DirectCollectiveArgs& args, int rank, bool among_all) {
  const std::int64_t first = among_all ? protocol::counted_rows_before(args.counts, rank, args.most_rows) : 0;
  return {first, protocol::counted_rows(args.counts, rank, args.most_rows)};
}
// A gather sends this rank's own rows to everybody and receives those of all; a reduction the other way round.
__device__ __forceinline__ RowRange send_of(const DirectCollectiveArgs& args, int peer) {
  if (args.counts == nullptr) return args.send[peer];
  return args.operation == DirectOperation::all_gather_v ? counted(args, args.context.rank, false) : counted(args, peer, true);
}
__device__ __forceinline__ RowRange receive_of(const DirectCollectiveArgs& args, int peer) {
  if (args.counts == nullptr) return args.receive[peer];
  return args.operation == DirectOperation::all_gather_v ? counted(args, peer, true) : counted(args, args.context.rank, false);
}

__device__ LaneCut cut_of(const DirectCollectiveArgs& args, const RowRange& range) {
  return LaneCut::of(range.count * args.row_bytes, args.lanes.lanes, args.lanes.slot_bytes);
}
__device__ std::uint64_t* word_at(const Context& c, int owner, std::int64_t offset) {
  return reinterpret_cast<std::uint64_t*>(arena(c, owner) + offset);
}
__device__ std::byte* slot_at(const DirectCollectiveArgs& args, int owner, int source, int lane, std::int64_t n) {
  return arena(args.context, owner) + args.lanes.slot(source, lane, n);
}
// The word that says that chunks up to the n-th of a call have arrived, or were consumed.
__device__ std::uint64_t after_chunk(std::uint64_t call, std::int64_t n) {
  return protocol::flag_word(call, static_cast<std::uint32_t>(n + 1));
}

// ---- the beginning ----

__device__ CollectiveHeader header_for(const DirectCollectiveArgs& args, int peer, std::uint64_t call) {
  return {.call = call,
          .row_bytes = args.row_bytes,
          .sends = send_of(args, peer).count,
          .expects = receive_of(args, peer).count,
          .operation = static_cast<std::uint32_t>(args.operation),
          .dtype = static_cast<std::uint32_t>(args.dtype)};
}

// By the threads of one block: what this rank calls, then that it has begun. What earlier calls left in slots was taken out.
__device__ void announce_to_peers(const DirectCollectiveArgs& args, std::uint64_t call) {
  const Context& c = args.context;
  for (int i = threadIdx.x; i < c.ranks - 1; i += blockDim.x) {
    const int peer = (c.rank + 1 + i) % c.ranks;
    *reinterpret_cast<CollectiveHeader*>(arena(c, peer) + args.lanes.header(c.rank, call)) = header_for(args, peer, call);
    set_flag(c, Flag::begun, peer, call);  // release: publishes the header
  }
}

__device__ bool agrees_with(const DirectCollectiveArgs& args, int peer, std::uint64_t call) {
  const Context& c = args.context;
  const auto& theirs = *reinterpret_cast<const CollectiveHeader*>(arena(c, c.rank) + args.lanes.header(peer, call));
  if (header_for(args, peer, call).fits(theirs)) return true;
  fail(c, FailureKind::mismatch, Phase::collective, peer, receive_of(args, peer).count, theirs.sends);
  return false;
}

// In every block: nothing is written to a peer before all have begun, so that a call that a rank rejects leaves nothing behind.
// Block-uniform.
__device__ bool begin_collective(const DirectCollectiveArgs& args) {
  const Context& c = args.context;
  const CallState state = state_of_call(c);
  const std::uint64_t call = state.call;
  if (state.failed) return false;
  if (blockIdx.x == 0) {
    if (!settle(c, state)) return false;
    announce_to_peers(args, call);
  }
  bool good = true;
  for (int peer = threadIdx.x; peer < c.ranks; peer += blockDim.x) {
    if (peer == c.rank) continue;
    good = wait_for_flag(c, Flag::begun, {peer, Phase::collective, call}) && good;
    if (good && blockIdx.x == 0) good = agrees_with(args, peer, call);
  }
  return __syncthreads_and(good) != 0;
}

// ---- work on a chunk, by the whole block ----

// step(from, to, at, size) for each run of [begin, begin + bytes) that lies in one piece in both; `at` counts from begin.
template <class Step>
__device__ __forceinline__ void for_each_run(const RowSequence<const std::byte>& from, const RowSequence<std::byte>& to, std::int64_t begin,
                                             std::int64_t bytes, Step&& step) {
#pragma unroll 1
  for (std::int64_t at = 0; at < bytes;) {
    const std::int64_t size = to.run(begin + at, from.run(begin + at, bytes - at));
    step(from.at(begin + at), to.at(begin + at), at, size);
    at += size;
  }
}

// kWords words of this thread, from `at` on.
template <class Word>
constexpr std::int64_t kStep = static_cast<std::int64_t>(kDirectThreads) * sizeof(Word);
template <class Word, int kWords>
__device__ __forceinline__ void copy_words(const std::byte* from, std::byte* to) {
  Word words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = load_word<Word>(from + i * kStep<Word>);
#pragma unroll
  for (int i = 0; i < kWords; ++i) *reinterpret_cast<Word*>(to + i * kStep<Word>) = words[i];
}

template <class Word>
__device__ __forceinline__ void copy_chunk(const RowSequence<const std::byte>& from, const RowSequence<std::byte>& to, std::int64_t begin,
                                           std::int64_t bytes) {
  constexpr int kBatch = 8;  // loads of a thread under way
  for_each_run(from, to, begin, bytes, [](const std::byte* source, std::byte* target, std::int64_t, std::int64_t size) {
    std::int64_t at = threadIdx.x * sizeof(Word);
#pragma unroll 1
    for (; at + (kBatch - 1) * kStep<Word> < size; at += kBatch * kStep<Word>) copy_words<Word, kBatch>(source + at, target + at);
#pragma unroll 1
    for (; at < size; at += kStep<Word>) copy_words<Word, 1>(source + at, target + at);
  });
}

// Where the n-th chunk of a lane lies for every rank: in slots that lie `pitch` apart, this rank's own among its rows.
struct Terms {
  const std::byte* slots;
  std::int64_t pitch;
  int rank, ranks;
  __device__ __forceinline__ const std::byte* at(int term, const std::byte* own, std::int64_t offset) const {
    return term == rank ? own : slots + term * pitch + offset;
  }
};

// kWords words of this thread, from `offset` of the chunk on. Those of two ranks are under way at once.
template <class Sum, int kWords>
__device__ __forceinline__ void sum_words(const Terms& terms, const std::byte* own, std::byte* out, std::int64_t offset) {
  using Word = typename Sum::Word;
  Sum sums[kWords];
  const auto load = [&](int term, Word(&words)[kWords]) {
    const std::byte* const from = terms.at(term, own, offset);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_word<Word>(from + i * kStep<Word>);
  };
  const auto add = [&](const Word(&words)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) sums[i].add(words[i]);
  };
  int term = 0;
#pragma unroll 1
  for (; term + 1 < terms.ranks; term += 2) {
    Word first[kWords], second[kWords];
    load(term, first);
    load(term + 1, second);
    add(first);
    add(second);
  }
  if (term < terms.ranks) {
    Word last[kWords];
    load(term, last);
    add(last);
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) *reinterpret_cast<Word*>(out + i * kStep<Word>) = sums[i].rounded();
}

template <class Sum>
__device__ __forceinline__ void sum_chunk(const DirectCollectiveArgs& args, const LaneCut& cut, int lane, std::int64_t n) {
  using Word = typename Sum::Word;
  constexpr int kBatch = 2;  // as many as there are registers for
  const Context& c = args.context;
  const Terms terms{.slots = slot_at(args, c.rank, 0, lane, n),
                    .pitch = args.lanes.slot(1, 0, 0) - args.lanes.slot(0, 0, 0),
                    .rank = c.rank,
                    .ranks = c.ranks};
  const RowSequence<const std::byte> from = rows_of(args.in, send_of(args, c.rank), args.row_bytes);
  const RowSequence<std::byte> to = rows_of(args.out, receive_of(args, c.rank), args.row_bytes);
  for_each_run(from, to, cut.begin(lane, n), cut.bytes(lane, n),
               [&](const std::byte* own, std::byte* out, std::int64_t begin, std::int64_t size) {
                 std::int64_t at = threadIdx.x * sizeof(Word);
#pragma unroll 1
                 for (; at + (kBatch - 1) * kStep<Word> < size; at += kBatch * kStep<Word>)
                   sum_words<Sum, kBatch>(terms, own + at, out + at, begin + at);
#pragma unroll 1
                 for (; at < size; at += kStep<Word>) sum_words<Sum, 1>(terms, own + at, out + at, begin + at);
               });
}

// ---- roles ----

// The whole block waits until the word of `peer` is there.
__device__ bool wait_in_block(const Context& c, std::int64_t offset, std::uint64_t least, int peer) {
  const bool good = threadIdx.x != 0 || wait_for_word(c, word_at(c, c.rank, offset), least, {peer, Phase::collective, call_number(c)});
  return __syncthreads_and(good) != 0;
}

// Peer after peer, chunk after chunk; a peer's slots are free until it has had a few chunks of this call.
template <class Word>
__device__ void push_lane(const DirectCollectiveArgs& args, int lane) {
  const Context& c = args.context;
  const std::uint64_t call = call_number(c);
  bool left = true;
  for (std::int64_t n = 0; left; ++n) {
    left = false;
    for (int i = 1; i < c.ranks; ++i) {
      const int peer = (c.rank + i) % c.ranks;
      const LaneCut cut = cut_of(args, send_of(args, peer));
      if (n >= cut.chunks_of(lane)) continue;
      left = true;
      if (n >= protocol::kLaneSlots &&
          !wait_in_block(c, args.lanes.consumed(peer, lane), after_chunk(call, n - protocol::kLaneSlots), peer))
        return;
      const std::int64_t begin = cut.begin(lane, n);
      copy_chunk<Word>(rows_of(args.in, send_of(args, peer), args.row_bytes), chunk_at(slot_at(args, peer, c.rank, lane, n), begin), begin,
                       cut.bytes(lane, n));
      __syncthreads();
      // release: publishes the chunk, which all threads of the block wrote before the barrier.
      if (threadIdx.x == 0) ptx::store_release(word_at(c, peer, args.lanes.arrived(c.rank, lane)), after_chunk(call, n));
    }
  }
}

// Gives the slot of the n-th chunk back where another one will need it. What was read of it is in registers, behind a barrier:
// nothing is left for a release to wait for.
__device__ void give_back(const DirectCollectiveArgs& args, int source, int lane, std::int64_t n, std::int64_t chunks) {
  const Context& c = args.context;
  if (n + protocol::kLaneSlots >= chunks) return;
  ptx::store_relaxed(word_at(c, source, args.lanes.consumed(c.rank, lane)), after_chunk(call_number(c), n));
}

struct NoSum {};

// What arrives goes to its rows of out.
template <class Word>
__device__ void take_copies(const DirectCollectiveArgs& args, int lane) {
  const Context& c = args.context;
  const std::uint64_t call = call_number(c);
  bool left = true;
  for (std::int64_t n = 0; left; ++n) {
    left = false;
    for (int i = 0; i < c.ranks; ++i) {
      const int source = (c.rank + c.ranks - i) % c.ranks;
      if (source == c.rank && !args.keeps_own) continue;
      const LaneCut cut = cut_of(args, receive_of(args, source));
      const std::int64_t chunks = cut.chunks_of(lane);
      if (n >= chunks) continue;
      left = true;
      const RowSequence<std::byte> to = rows_of(args.out, receive_of(args, source), args.row_bytes);
      const std::int64_t begin = cut.begin(lane, n), bytes = cut.bytes(lane, n);
      if (source == c.rank) {
        copy_chunk<Word>(rows_of(args.in, send_of(args, c.rank), args.row_bytes), to, begin, bytes);
        continue;
      }
      if (!wait_in_block(c, args.lanes.arrived(source, lane), after_chunk(call, n), source)) return;
      const std::byte* const slot = slot_at(args, c.rank, source, lane, n);
      copy_chunk<Word>(chunk_at(slot, begin), to, begin, bytes);
      __syncthreads();
      if (threadIdx.x == 0) give_back(args, source, lane, n, chunks);
    }
  }
}

// The n-th chunk of every source, added up once all are there.
template <class Sum>
__device__ void take_sums(const DirectCollectiveArgs& args, int lane) {
  const Context& c = args.context;
  const std::uint64_t call = call_number(c);
  const LaneCut cut = cut_of(args, receive_of(args, c.rank));
  const std::int64_t chunks = cut.chunks_of(lane);
  for (std::int64_t n = 0; n < chunks; ++n) {
    bool good = true;
    for (int source = threadIdx.x; source < c.ranks; source += blockDim.x) {
      if (source == c.rank) continue;
      const std::uint64_t* const word = word_at(c, c.rank, args.lanes.arrived(source, lane));
      good = good && wait_for_word(c, word, after_chunk(call, n), {source, Phase::collective, call});
    }
    if (__syncthreads_and(good) == 0) return;
    sum_chunk<Sum>(args, cut, lane, n);
    __syncthreads();
    for (int source = threadIdx.x; source < c.ranks; source += blockDim.x) {
      if (source != c.rank) give_back(args, source, lane, n, chunks);
    }
  }
}

template <class Word, class Sum>
__global__ void __launch_bounds__(kDirectThreads, 2) direct_collective(const __grid_constant__ DirectCollectiveArgs args) {
  if (begin_collective(args)) {
    const int lane = static_cast<int>(blockIdx.x) / 2;
    if (blockIdx.x % 2 == 0) {
      push_lane<Word>(args, lane);
    } else if constexpr (std::is_same_v<Sum, NoSum>) {
      take_copies<Word>(args, lane);
    } else {
      take_sums<Sum>(args, lane);
    }
  }
  if (is_last_block(args.context, kDirectEnd)) end_call(args.context);
}

template <class Word>
constexpr auto* kCopies = direct_collective<Word, NoSum>;
template <class Sum>
constexpr auto* kSums = direct_collective<typename Sum::Word, Sum>;

const Preloaded preloaded({{kCopies<int4>},
                           {kCopies<std::uint32_t>},
                           {kCopies<std::uint16_t>},
                           {kCopies<std::uint8_t>},
                           {kSums<VectorSum<Dtype::float32>>},
                           {kSums<VectorSum<Dtype::bfloat16>>},
                           {kSums<VectorSum<Dtype::float16>>},
                           {kSums<ElementSum<Dtype::float64>>},
                           {kSums<ElementSum<Dtype::float32>>},
                           {kSums<ElementSum<Dtype::bfloat16>>},
                           {kSums<ElementSum<Dtype::float16>>}});

using Kernel = void (*)(const DirectCollectiveArgs);

Kernel copying(int word_bytes) {
  if (word_bytes == 16) return kCopies<int4>;
  if (word_bytes == 4) return kCopies<std::uint32_t>;
  return word_bytes == 2 ? kCopies<std::uint16_t> : kCopies<std::uint8_t>;
}
template <Dtype kDtype>
Kernel summing(int word_bytes) {
  return word_bytes == 16 ? kSums<VectorSum<kDtype>> : kSums<ElementSum<kDtype>>;
}
Kernel kernel_for(const DirectCollectiveArgs& args) {
  if (args.operation != DirectOperation::reduce_scatter_v) return copying(args.word_bytes);
  switch (args.dtype) {
    case Dtype::float64:
      return kSums<ElementSum<Dtype::float64>>;
    case Dtype::float32:
      return summing<Dtype::float32>(args.word_bytes);
    case Dtype::bfloat16:
      return summing<Dtype::bfloat16>(args.word_bytes);
    default:
      return summing<Dtype::float16>(args.word_bytes);
  }
}

}  // namespace

void launch_direct_collective(const DirectCollectiveArgs& args, Stream stream) {
  const Launch launch(2 * args.lanes_used, kDirectThreads, 0, stream, Resident::together);
  launch(kernel_for(args), args);
}

}  // namespace tokenyard::cuda
