// Latency mode: one kernel announces the call, moves rows into slots that need no counts, tells the receivers, waits for what
// others send, and lands it. Its blocks wait for each other and for peers, so all of them are resident at once.

#include <cuda_runtime_api.h>

#include "kernels/cuda/preload.h"
#include "kernels/cuda/received.cuh"
#include "kernels/cuda/routing.cuh"
#include "kernels/cuda/source.cuh"

namespace tokenyard::cuda {
namespace {

constexpr int kSlotThreads = 512;
constexpr int kUnroll = 4;  // vectors of a row in each thread
constexpr int kPieceBytes = kSlotThreads * kUnroll * 16;
constexpr int kPieceBlocks = kPieceBytes / kQuantiseBlock;
constexpr int kKnownPeers = 64;   // whose addresses are kept in shared memory
constexpr int kMaxGroups = 2048;  // of 32 ranks

enum Ticket { kSentTicket, kLandedTicket };

struct Peer {
  std::byte* arena;
  int buffer;
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

__device__ bool goes_to(const SlotsMemory& memory, int rank) { return (memory.present[rank / kLanes] >> (rank % kLanes) & 1) != 0; }

__device__ Peer peer_of(const MoveArgs& args, const SlotsMemory& memory, int rank, std::uint64_t call) {
  if (rank < kKnownPeers) return memory.peers[rank];
  return {arena(args.context, rank), buffer_of(args.context, rank, call, args.buffer)};
}

// wait_for_peers that also remembers what peers offer. Block-uniform.
__device__ bool meet_peers(const MoveArgs& args, const protocol::CallHeader& header, SlotsMemory& memory, std::uint64_t call) {
  const Context& c = args.context;
  bool good = true;
  for (int peer = threadIdx.x; peer < c.ranks; peer += kSlotThreads) {
    std::byte* at = arena(c, peer);
    if (peer != c.rank) good = wait_for_flag(c, Flag::begun, peer, Phase::dispatch_credit, call) && good;
    if (peer < kKnownPeers) memory.peers[peer] = {at, buffer_of(c, peer, call, args.buffer)};
    if (peer != c.rank) good = good && agrees(c, header, peer, Phase::dispatch_credit);
  }
  return __syncthreads_and(good) != 0;
}

// Everything about a token that needs no peer: loads are under way, or done, before the wait.
__device__ Token look_at(const MoveJob& job, std::int32_t index, std::uint64_t call) {
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

// Which ranks the token goes to: from its ids, remembered in the handle, or from the handle. Begins and ends with a barrier.
__device__ void find_destinations(const MoveArgs& args, const Token& token, SlotsMemory& memory) {
  const Context& c = args.context;
  const int groups = (c.ranks + kLanes - 1) / kLanes;
  const std::int64_t first = static_cast<std::int64_t>(token.index) * c.ranks;
  __syncthreads();
  for (int group = threadIdx.x; group < groups; group += kSlotThreads) memory.present[group] = 0;
  __syncthreads();
  if (args.cached) {
    for (int rank = threadIdx.x; rank < c.ranks; rank += kSlotThreads) {
      if (args.handle.slots[first + rank] >= 0) atomicOr(&memory.present[rank / kLanes], 1U << (rank % kLanes));
    }
  }
  for (int rank = warp_index(); !args.cached && rank < c.ranks; rank += warps_of_block()) {
    const std::uint64_t k_mask = k_mask_of(local_ids_at(args.routing, token.choices, rank));
    if (lane_index() != 0) continue;
    args.handle.slots[first + rank] = k_mask != 0 ? static_cast<std::int32_t>(c.rank * c.shape.max_tokens_per_rank + token.index) : -1;
    args.handle.k_masks[first + rank] = k_mask;
    if (k_mask != 0) atomicOr(&memory.present[rank / kLanes], 1U << (rank % kLanes));
  }
  if (!args.cached && warp_index() == 0) {
    IdCounts ids;
    for (int k = lane_index(); k < args.routing.top_k; k += kLanes) checked_shards(c, args.routing, token.index, k, ids);
    add_id_counts(c, ids);
  }
  __syncthreads();
}

// One piece of the row, by the block, to every rank that gets it.
__device__ void store_piece(const MoveJob& job, const Token& token, const int4 (&v)[kUnroll], std::int64_t piece,
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
__device__ void store_scales(const MoveJob& job, const Token& token, const SlotsMemory& memory) {
  const Context& c = job.args.context;
  const ScaleCopy& scales = job.scales;
  const std::int64_t slot = c.rank * c.shape.max_tokens_per_rank + token.index;
  if (scales.units == 0) return;
  for (int rank = warp_index(); rank < c.ranks; rank += warps_of_block()) {
    if (!goes_to(memory, rank)) continue;
    const Peer peer = peer_of(job.args, memory, rank, token.call);
    std::byte* to = peer.arena + c.layout.scales + peer.buffer * c.layout.scales_bytes + slot * scales.row_bytes;
    for (int unit = lane_index(); unit < scales.units; unit += kLanes) {
      const int4 value = unit < kLanes ? token.scales : load_scale_unit(job, token.index, unit);
      store_unit(to + static_cast<std::int64_t>(unit) * scales.width, value, scales.width);
    }
  }
}

// The scales of one quantised piece, one destination per warp.
__device__ void store_staged_scales(const MoveJob& job, const Token& token, int first_block, const SlotsStage& stage,
                                    const SlotsMemory& memory) {
  const Context& c = job.args.context;
  const SourceArgs& source = job.args.source;
  const int blocks = min(kPieceBlocks, (source.hidden_size + kQuantiseBlock - 1) / kQuantiseBlock - first_block);
  const int words = quantised_scale_bytes(source.format, blocks) / 4;
  const std::int64_t slot = c.rank * c.shape.max_tokens_per_rank + token.index;
  for (int rank = warp_index(); rank < c.ranks; rank += warps_of_block()) {
    if (!goes_to(memory, rank)) continue;
    const Peer peer = peer_of(job.args, memory, rank, token.call);
    std::byte* to = peer.arena + c.layout.scales + peer.buffer * c.layout.scales_bytes + slot * job.scales.row_bytes;
    to += quantised_scale_bytes(source.format, first_block);
    for (int word = lane_index(); word < words; word += kLanes) {
      reinterpret_cast<std::uint32_t*>(to)[word] = reinterpret_cast<const std::uint32_t*>(stage.scales)[word];
    }
  }
}

// Quantises a piece by the whole block, and reads this thread's vectors of it. Ends with a barrier.
__device__ void quantise_piece(const MoveJob& job, const Token& token, std::int64_t piece, int4 (&v)[kUnroll], SlotsStage& stage) {
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
__device__ std::int32_t remote_ordinal(const SlotsMemory& memory, int own_rank, int rank) {
  std::int32_t before = 0;
  for (int group = 0; group < rank / kLanes; ++group) before += __popc(memory.present[group]);
  before += __popc(memory.present[rank / kLanes] & ((1U << (rank % kLanes)) - 1));
  return own_rank < rank && goes_to(memory, own_rank) ? before - 1 : before;
}

// A record for every rank, also where the token does not go: the receiver has no other way to know.
__device__ void store_records(const MoveArgs& args, const Token& token, const SlotsMemory& memory) {
  const Context& c = args.context;
  const std::int64_t slot = c.rank * c.shape.max_tokens_per_rank + token.index;
  for (int rank = warp_index(); rank < c.ranks; rank += warps_of_block()) {
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

// Block-uniform; false: the call has failed.
template <bool kQuantise>
__device__ bool send_tokens(const MoveJob& job, const protocol::CallHeader& header, SlotsMemory& memory, SlotsStage* stage) {
  const MoveArgs& args = job.args;
  const std::int64_t row_bytes = args.source.row_bytes;
  const std::int32_t tokens = args.cached ? args.handle.header->num_tokens : args.routing.num_tokens;
  const std::uint64_t call = call_number(args.context);
  bool met = false;
  for (std::int32_t index = static_cast<std::int32_t>(blockIdx.x); index < tokens; index += static_cast<std::int32_t>(gridDim.x)) {
    Token token = look_at(job, index, call);
    if constexpr (kQuantise) quantise_piece(job, token, 0, token.row, *stage);
    find_destinations(args, token, memory);
    if (!met && !meet_peers(args, header, memory, call)) return false;
    met = true;
    store_piece(job, token, token.row, 0, memory);
    if constexpr (kQuantise) {
      store_staged_scales(job, token, 0, *stage, memory);
    } else {
      store_scales(job, token, memory);
    }
    if (!args.cached) store_records(args, token, memory);
    for (std::int64_t piece = kPieceBytes; piece < row_bytes; piece += kPieceBytes) {
      if constexpr (kQuantise) {
        quantise_piece(job, token, piece, token.row, *stage);
        store_staged_scales(job, token, static_cast<int>(piece) / kQuantiseBlock, *stage, memory);
      } else {
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
          const std::int64_t at = piece + (j * kSlotThreads + static_cast<int>(threadIdx.x)) * 16;
          if (at < row_bytes) token.row[j] = load_16(row_at(args.source, index) + at, job.row_width);
        }
      }
      store_piece(job, token, token.row, piece, memory);
    }
  }
  return true;
}

// By the last block that has sent: every rank may read what this rank's blocks wrote for it.
__device__ void publish_rows(const MoveJob& job, const protocol::CallHeader& header) {
  const MoveArgs& args = job.args;
  const Context& c = args.context;
  if (block_has_failed(c)) return;
  const std::uint64_t call = call_number(c);
  const std::int32_t tokens = args.cached ? args.handle.header->num_tokens : args.routing.num_tokens;
  // Also without tokens: that a rank has sent says that it has seen everybody begin.
  if (!wait_for_peers(c, header, Phase::dispatch_credit)) return;
  for (int peer = threadIdx.x; peer < c.ranks; peer += kSlotThreads) {
    mailbox(c, peer, c.rank).tokens[call % protocol::kRing] = static_cast<std::uint64_t>(tokens);
  }
  __syncthreads();
  set_flag_everywhere(c, Flag::rows, call);
  for (int rank = warp_index(); !args.cached && rank < c.ranks; rank += warps_of_block()) {
    std::int32_t sent = 0;
    for (std::int32_t token = lane_index(); token < tokens; token += kLanes) {
      sent += args.handle.slots[static_cast<std::int64_t>(token) * c.ranks + rank] >= 0 ? 1 : 0;
    }
    sent = __reduce_add_sync(kAllLanes, sent);
    if (lane_index() == 0) args.handle.sent_counts[rank] = sent;
  }
  __syncthreads();
  add_link_bytes(c, args.handle.sent_counts, args.source.row_bytes + job.scales.row_bytes);
}

// A share of the slots of one source, by the block.
__device__ void land_source(const MoveArgs& args, std::uint64_t call, int source, unsigned part, unsigned parts) {
  const Context& c = args.context;
  const HandleView& handle = args.handle;
  const std::uint64_t sent = mailbox(c, c.rank, source).tokens[call % protocol::kRing];
  const auto top_k = static_cast<unsigned>(handle.top_k);
  const std::int64_t first_row = source * c.shape.max_tokens_per_rank;
  const std::int64_t record_bytes = c.shape.record_bytes();
  const std::byte* records = receive_records(c, c.rank, args.buffer) + first_row * record_bytes;
  const unsigned pairs = static_cast<unsigned>(c.shape.max_tokens_per_rank) * top_k;  // at most 2^31
  std::int32_t present = 0;
  for (unsigned at = part * kSlotThreads + threadIdx.x; at < pairs; at += parts * kSlotThreads) {
    const std::int64_t token = at / top_k;
    const int k = static_cast<int>(at % top_k);
    ReceivedPair pair;
    if (static_cast<std::uint64_t>(token) < sent) pair = read_pair(records + token * record_bytes, k, handle.top_k);
    write_pair(handle, first_row + token, k, source, pair);
    if (pair.local_id >= 0 && pair.local_id < args.routing.local_experts) atomicAdd(&handle.expert_counts[pair.local_id], 1);
    if (k != 0) continue;
    if (pair.source_token >= 0) ++present;
    if (handle.present != nullptr) handle.present[first_row + token] = pair.source_token >= 0 ? 1 : 0;
  }
  present = __reduce_add_sync(kAllLanes, present);
  if (lane_index() == 0 && present != 0) atomicAdd(&handle.rank_counts[source], present);
}

// Sources are shared out among blocks: with fewer blocks than ranks each takes several, else several take one.
__device__ void land_slots(const MoveArgs& args) {
  const Context& c = args.context;
  if (block_has_failed(c)) return;
  const std::uint64_t call = call_number(c);
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  for (int source = block % c.ranks; source < c.ranks; source += blocks) {
    const bool arrived = threadIdx.x != 0 || wait_for_flag(c, Flag::rows, source, Phase::dispatch_rows, call);
    if (__syncthreads_and(arrived) == 0) return;
    const int parts = max(1, (blocks - source + c.ranks - 1) / c.ranks);
    land_source(args, call, source, static_cast<unsigned>(block / c.ranks), static_cast<unsigned>(parts));
  }
}

// By the last block of all.
__device__ void finish_handle(const MoveArgs& args, bool last) {
  const Context& c = args.context;
  const HandleView& handle = args.handle;
  const std::uint64_t call = call_number(c);
  const std::int32_t tokens = args.routing.num_tokens;
  if (block_has_failed(c)) {
    clear_counts(c, handle, tokens, args.routing.local_experts);
    clear_sent(c, handle, tokens);
    clear_received(handle, received_capacity(c, Mode::latency));
    for (std::int64_t i = threadIdx.x; handle.present != nullptr && i < received_capacity(c, Mode::latency); i += kSlotThreads)
      handle.present[i] = 0;
    __syncthreads();
  } else if (warp_index() == 0) {
    std::int32_t rows = 0;
    for (int rank = lane_index(); rank <= c.ranks; rank += kLanes) {
      handle.source_begin[rank] = static_cast<std::int32_t>(rank * c.shape.max_tokens_per_rank);
      if (rank < c.ranks) rows += handle.rank_counts[rank];
    }
    rows = __reduce_add_sync(kAllLanes, rows);
    if (lane_index() == 0) {
      HandleView::Header header{.call = call, .num_tokens = tokens, .num_rows = rows, .layout_rows = rows};
      take_id_counts(c, header);
      *handle.header = header;
    }
  }
  if (threadIdx.x != 0) return;
  reset_id_counts(c);
  if (last) tell_host(args.host, call, *handle.header, 0);
}

template <bool kQuantise>
__global__ void __launch_bounds__(kSlotThreads, 1) dispatch_slots(const __grid_constant__ MoveJob job, bool last) {
  extern __shared__ SlotsStage stage[];
  __shared__ SlotsMemory memory;
  const MoveArgs& args = job.args;
  const Context& c = args.context;
  const protocol::CallHeader header = complete_header(args.header, args.handle);
  bool good = !block_has_failed(c);
  if (good && blockIdx.x == 0) {
    // Zero before anybody lands here: sources send only after they have seen this rank begin.
    for (int rank = threadIdx.x; !args.cached && rank < c.ranks; rank += kSlotThreads) args.handle.rank_counts[rank] = 0;
    for (int local = threadIdx.x; !args.cached && local < args.routing.local_experts; local += kSlotThreads) {
      args.handle.expert_counts[local] = 0;
      args.handle.dropped[local] = 0;
    }
    good = begin_call(c, header, args.buffer);
  }
  if (good) send_tokens<kQuantise>(job, header, memory, stage);
  if (is_last_block(c, kSentTicket)) publish_rows(job, header);
  if (!args.cached) land_slots(args);
  if (!is_last_block(c, kLandedTicket)) return;
  if (!args.cached) finish_handle(args, last);
  if (args.cached && !block_has_failed(c)) wait_for_all(c, Flag::rows, Phase::dispatch_rows);
  if (last) end_call(c);
}

const Preloaded preloaded({{dispatch_slots<false>}, {dispatch_slots<true>}});

}  // namespace

void launch_slots(const MoveArgs& args, bool last, Stream stream) {
  const MoveJob job = move_job(args);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.blocks));
  config.blockDim = dim3(kSlotThreads);
  config.dynamicSmemBytes = args.source.quantise ? sizeof(SlotsStage) : 0;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  // A failed launch is the runtime's last error, which the caller asks for.
  if (args.source.quantise) {
    static_cast<void>(cudaLaunchKernelEx(&config, dispatch_slots<true>, job, last));
  } else {
    static_cast<void>(cudaLaunchKernelEx(&config, dispatch_slots<false>, job, last));
  }
}

}  // namespace tokenyard::cuda
