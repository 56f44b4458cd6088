#pragma once
// The sending half of a dispatch in latency mode: a block takes a token at a time, finds where it goes, stores row, record and scales
// into slots of all its ranks, and tells every rank by the token's own flag.

#include "kernels/cuda/received.cuh"
#include "kernels/cuda/routing.cuh"
#include "kernels/cuda/source.cuh"

namespace tokenyard::cuda {

constexpr int kSlotThreads = 512;
constexpr int kUnroll = 4;  // vectors of a row in each thread
constexpr int kPieceBytes = kSlotThreads * kUnroll * 16;
constexpr int kPieceBlocks = kPieceBytes / kQuantiseBlock;
constexpr int kKnownPeers = 64;   // whose addresses are kept in shared memory
constexpr int kMaxGroups = 2048;  // of 32 ranks

struct Peer {
  std::byte* arena;
  int buffer;
  std::int32_t tokens;  // that it sends
};
struct SlotsMemory {
  Peer peers[kKnownPeers];
  std::uint32_t present[kMaxGroups];  // bit per rank: the current token goes there
};
struct alignas(16) SlotsStage {  // where rows are quantised
  std::byte elements[kPieceBytes];
  std::byte scales[kPieceBlocks * 4];
};

// What a block knows of the token it sends.
struct Token {
  std::uint64_t call = 0;
  std::int32_t index = 0;
  TokenChoices choices;    // of this warp's lanes
  int4 row[kUnroll] = {};  // the first piece, unless rows are quantised
  int4 scales = {};        // unit `lane`
};

__device__ inline bool goes_to(const SlotsMemory& memory, int rank) { return (memory.present[rank / kLanes] >> (rank % kLanes) & 1) != 0; }

// What a rank that has begun offers. This rank's own announcement may not be there yet, and is not needed.
__device__ inline Peer peer_with(const MoveArgs& args, int rank, std::uint64_t begun) {
  std::byte* const memory = arena(args.context, rank);
  if (rank == args.context.rank) return {memory, args.buffer, tokens_of(args)};
  return {memory, protocol::offered_buffer(begun), protocol::offered_tokens(begun)};
}
__device__ inline Peer peer_of(const MoveArgs& args, const SlotsMemory& memory, int rank, std::uint64_t call) {
  return rank < kKnownPeers ? memory.peers[rank] : peer_with(args, rank, *flag_of(args.context, of_call(Flag::begun, call), rank));
}

// Waits until the others have begun, and remembers what all offer and send. Only block 0 checks that they make the same call: rows harm
// nobody, since what a peer offers is free to be written. False, in the threads that learn it: the call has failed. A barrier must follow.
__device__ inline bool meet_peers(const MoveArgs& args, const protocol::CallHeader& header, SlotsMemory& memory, std::uint64_t call) {
  const Context& c = args.context;
  bool good = true;
#pragma unroll 1
  for (int peer = static_cast<int>(threadIdx.x + kLanes) % kSlotThreads; peer < c.ranks; peer += kSlotThreads) {  // the last warp first
    std::uint64_t begun = 0;
    if (peer != c.rank) {
      const Wait wait{.peer = peer, .phase = Phase::dispatch_credit, .call = call, .timed = blockIdx.x == 0};
      begun = await_word(c, flag_of(c, of_call(Flag::begun, call), peer), protocol::flag_word(call), wait);
      good = good && begun != 0 && protocol::offered_buffer(begun) != protocol::kNoBuffer;
    }
    if (peer < kKnownPeers) memory.peers[peer] = peer_with(args, peer, begun);
  }
  if (blockIdx.x == 0) good = check_peers(c, header, Phase::dispatch_credit, call) && good;
  return good;
}

// Everything about a token that needs no peer: loads are under way, or done, before the wait.
__device__ inline Token look_at(const MoveJob& job, std::int32_t index, std::uint64_t call) {
  Token token;
  token.call = call;
  token.index = index;
  const SourceArgs& source = job.args.source;
  if (!source.quantise) {
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int at = (j * kSlotThreads + static_cast<int>(threadIdx.x)) * 16;
      if (at < source.row_bytes) token.row[j] = load_16(row_at(source, index) + at, job.row_width);
    }
    if (lane_index() < job.scales.units) token.scales = load_scale_unit(job, index, lane_index());
  }
  if (!job.args.cached) token.choices = choices_of(job.args.routing, job.args.context.rank, index);
  return token;
}

// By one warp: what is wrong with the ids and weights of a token. False: enough to refuse the call. The token is not sent then, and peers
// that wait for it learn why.
__device__ inline bool check_ids(const MoveArgs& args, const Token& token) {
  IdCounts ids;
#pragma unroll 1
  for (int k = lane_index(); k < args.routing.top_k; k += kLanes) {
    const std::int64_t expert = id_at(args.routing, token.index, k);
    check_id(args.context, args.routing, token.index, k, expert, ids);
    const std::uint32_t* shards = shards_for(args.routing, args.context.rank, token.index, expert);
    if (shards != nullptr && shards[0] == kNoInstance) ++ids.lost;
  }
  add_id_counts(args.context, ids);
  return !ids.refused;
}

// Which ranks the token goes to: from its ids, remembered in the handle, or from the handle. Begins with a barrier;
// another must follow. False, in the threads that learn it: the token is refused.
__device__ inline bool find_destinations(const MoveArgs& args, const Token& token, SlotsMemory& memory) {
  const Context& c = args.context;
  const int groups = (c.ranks + kLanes - 1) / kLanes;
  const std::int64_t first = static_cast<std::int64_t>(token.index) * c.ranks;
  __syncthreads();
#pragma unroll 1
  for (int group = threadIdx.x; group < groups; group += kSlotThreads) memory.present[group] = 0;
  __syncthreads();
  if (args.cached) {
#pragma unroll 1
    for (int rank = threadIdx.x; rank < c.ranks; rank += kSlotThreads) {
      if (args.handle.slots[first + rank] >= 0) atomicOr(&memory.present[rank / kLanes], 1U << (rank % kLanes));
    }
  }
#pragma unroll 1
  for (int rank = warp_index(); !args.cached && rank < c.ranks; rank += warps_of_block()) {
    const std::uint64_t k_mask = k_mask_of(local_ids_at(args.routing, token.choices, rank));
    if (lane_index() != 0) continue;
    args.handle.slots[first + rank] = k_mask != 0 ? static_cast<std::int32_t>(c.rank * c.shape.max_tokens_per_rank + token.index) : -1;
    args.handle.k_masks[first + rank] = k_mask;
    if (k_mask != 0) atomicOr(&memory.present[rank / kLanes], 1U << (rank % kLanes));
  }
  return args.cached || warp_index() != warps_of_block() - 2 || check_ids(args, token);
}

// One piece of the row, by the block, to every rank that gets it.
__device__ inline void store_piece(const MoveJob& job, const Token& token, const int4 (&v)[kUnroll], std::int64_t piece,
                                   const SlotsMemory& memory) {
  const Context& c = job.args.context;
  const std::int64_t bytes = job.args.source.row_bytes - piece;
  const std::int64_t slot = c.rank * c.shape.max_tokens_per_rank + token.index;
  const int start = (c.rank + 1 + token.index) % c.ranks;
  for (int i = 0; i < c.ranks; ++i) {
    const int rank = start + i < c.ranks ? start + i : start + i - c.ranks;
    if (!goes_to(memory, rank)) continue;
    const Peer peer = peer_of(job.args, memory, rank, token.call);
    std::byte* to = peer.arena + c.layout.rows + peer.buffer * c.layout.rows_bytes + slot * job.args.source.row_bytes + piece;
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int at = (j * kSlotThreads + static_cast<int>(threadIdx.x)) * 16;
      if (at < bytes) ptx::store_streaming(to + at, v[j]);
    }
  }
}

// Scales that the caller has, one destination per warp.
__device__ inline void store_scales(const MoveJob& job, const Token& token, const SlotsMemory& memory) {
  const Context& c = job.args.context;
  const ScaleCopy& scales = job.scales;
  const std::int64_t slot = c.rank * c.shape.max_tokens_per_rank + token.index;
  if (scales.units == 0) return;
#pragma unroll 1
  for (int rank = warp_index(); rank < c.ranks; rank += warps_of_block()) {
    if (!goes_to(memory, rank)) continue;
    const Peer peer = peer_of(job.args, memory, rank, token.call);
    std::byte* to = peer.arena + c.layout.scales + peer.buffer * c.layout.scales_bytes + slot * scales.row_bytes;
#pragma unroll 1
    for (int unit = lane_index(); unit < scales.units; unit += kLanes) {
      const int4 value = unit < kLanes ? token.scales : load_scale_unit(job, token.index, unit);
      store_unit(to + static_cast<std::int64_t>(unit) * scales.width, value, scales.width);
    }
  }
}

// The scales of one quantised piece, one destination per warp.
__device__ inline void store_staged_scales(const MoveJob& job, const Token& token, int first_block, const SlotsStage& stage,
                                           const SlotsMemory& memory) {
  const Context& c = job.args.context;
  const SourceArgs& source = job.args.source;
  const int blocks = min(kPieceBlocks, (source.hidden_size + kQuantiseBlock - 1) / kQuantiseBlock - first_block);
  const int words = quantised_scale_bytes(source.format, blocks) / 4;
  const std::int64_t slot = c.rank * c.shape.max_tokens_per_rank + token.index;
#pragma unroll 1
  for (int rank = warp_index(); rank < c.ranks; rank += warps_of_block()) {
    if (!goes_to(memory, rank)) continue;
    const Peer peer = peer_of(job.args, memory, rank, token.call);
    std::byte* to = peer.arena + c.layout.scales + peer.buffer * c.layout.scales_bytes + slot * job.scales.row_bytes;
    to += quantised_scale_bytes(source.format, first_block);
#pragma unroll 1
    for (int word = lane_index(); word < words; word += kLanes) {
      reinterpret_cast<std::uint32_t*>(to)[word] = reinterpret_cast<const std::uint32_t*>(stage.scales)[word];
    }
  }
}

// Quantises a piece by the whole block, and reads this thread's vectors of it. Ends with a barrier.
__device__ inline void quantise_piece(const MoveJob& job, const Token& token, std::int64_t piece, int4 (&v)[kUnroll], SlotsStage& stage) {
  const int blocks = (job.args.source.hidden_size + kQuantiseBlock - 1) / kQuantiseBlock;
  const int first = static_cast<int>(piece) / kQuantiseBlock;
  __syncthreads();  // the piece before has been read
  quantise_blocks(job, token.index,
                  {.base = first, .first = first + warp_index(), .end = min(blocks, first + kPieceBlocks), .step = warps_of_block()},
                  {stage.elements, stage.scales});
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) v[j] = reinterpret_cast<const int4*>(stage.elements)[j * kSlotThreads + threadIdx.x];
}

// Where the ranks below `rank`, this one left out, put their partial sums of the token.
__device__ inline std::int32_t remote_ordinal(const SlotsMemory& memory, int own_rank, int rank) {
  std::int32_t before = 0;
  for (int group = 0; group < rank / kLanes; ++group) before += __popc(memory.present[group]);
  before += __popc(memory.present[rank / kLanes] & ((1U << (rank % kLanes)) - 1));
  return own_rank < rank && goes_to(memory, own_rank) ? before - 1 : before;
}

// A record for every rank, also where the token does not go: the receiver has no other way to know. The last warps have the least of
// the row to store.
__device__ inline void store_records(const MoveArgs& args, const Token& token, const SlotsMemory& memory) {
  const Context& c = args.context;
  const std::int64_t slot = c.rank * c.shape.max_tokens_per_rank + token.index;
#pragma unroll 1
  for (int rank = warps_of_block() - 1 - warp_index(); rank < c.ranks; rank += warps_of_block()) {
    RecordHead head;
    if (goes_to(memory, rank)) {
      head.source_token = token.index;
      const std::int64_t first_partial = token.index * c.shape.partials_per_token();
      if (rank != c.rank) head.partial_slot = static_cast<std::int32_t>(first_partial + remote_ordinal(memory, c.rank, rank));
    }
    const Peer peer = peer_of(args, memory, rank, token.call);
    std::byte* to = peer.arena + c.layout.records + peer.buffer * c.layout.records_bytes + slot * c.shape.record_bytes();
    write_record(to, head, token.choices, local_ids_at(args.routing, token.choices, rank), args.routing.top_k);
  }
}

// The block has stored all of a token: every rank is told.
__device__ inline void flag_token(const Context& c, const Token& token) {
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < c.ranks; i += kSlotThreads) {
    const int rank = (c.rank + 1 + i) % c.ranks;
    ptx::store_release(arrival(c, rank, c.rank, token.index), protocol::flag_word(token.call));
  }
}

// A token on its way is counted by a warp that lands little. Counts are zero when block 0 has begun.
__device__ inline void count_token(const MoveArgs& args, const Token& token, const SlotsMemory& memory) {
  const Context& c = args.context;
  if (warp_index() != warps_of_block() - 1 || !wait_for_own_begin(c, token.call)) return;
#pragma unroll 1
  for (int rank = lane_index(); rank < c.ranks; rank += kLanes) {
    if (goes_to(memory, rank)) atomicAdd(&args.handle.sent_counts[rank], 1);
  }
}

// One token after the first wait for peers.
template <bool kQuantise>
__device__ inline void send_token(const MoveJob& job, Token& token, const SlotsMemory& memory, SlotsStage* stage) {
  const MoveArgs& args = job.args;
  const std::int64_t row_bytes = args.source.row_bytes;
  if (!args.cached) store_records(args, token, memory);
  store_piece(job, token, token.row, 0, memory);
  if constexpr (kQuantise) {
    store_staged_scales(job, token, 0, *stage, memory);
  } else {
    store_scales(job, token, memory);
  }
  for (std::int64_t piece = kPieceBytes; piece < row_bytes; piece += kPieceBytes) {
    if constexpr (kQuantise) {
      quantise_piece(job, token, piece, token.row, *stage);
      store_staged_scales(job, token, static_cast<int>(piece) / kQuantiseBlock, *stage, memory);
    } else {
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const std::int64_t at = piece + (j * kSlotThreads + static_cast<int>(threadIdx.x)) * 16;
        if (at < row_bytes) token.row[j] = load_16(row_at(args.source, token.index) + at, job.row_width);
      }
    }
    store_piece(job, token, token.row, piece, memory);
  }
  flag_token(args.context, token);
  if (!args.cached) count_token(args, token, memory);
}

// Block 0 announces; it sends only where there are fewer blocks than that and the tokens need. Block-uniform; false: failed.
template <bool kQuantise>
__device__ inline bool send_tokens(const MoveJob& job, const protocol::CallHeader& header, std::uint64_t call, SlotsMemory& memory,
                                   SlotsStage* stage) {
  const MoveArgs& args = job.args;
  const std::int32_t tokens = tokens_of(args);
  const int step = static_cast<int>(gridDim.x);
  bool met = false;
  for (std::int32_t index = static_cast<int>(blockIdx.x) - (step > tokens ? 1 : 0); index < tokens; index += step) {
    if (index < 0) continue;
    Token token = look_at(job, index, call);
    if constexpr (kQuantise) quantise_piece(job, token, 0, token.row, *stage);
    const bool sends = find_destinations(args, token, memory);
    const bool meets = met || meet_peers(args, header, memory, call);
    if (__syncthreads_and(sends && meets) == 0) return false;
    met = true;
    send_token<kQuantise>(job, token, memory, stage);
  }
  return met || __syncthreads_and(meet_peers(args, header, memory, call)) != 0;
}

}  // namespace tokenyard::cuda
