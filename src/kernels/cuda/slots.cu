// Latency mode: one kernel announces the call, moves rows into slots that need no counts, flags every token by itself, lands what
// others send as it arrives, and pads groups of experts where that is the layout. Its blocks wait for each other and for peers, so all
// of them are resident at once.

#include <algorithm>

#include "core/preload.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pad.cuh"
#include "kernels/cuda/slots_send.cuh"

namespace tokenyard::cuda {
namespace {

enum Ticket { kLandedTicket, kEndTicket };

template <Pads kPads>
struct SlotsJob {
  MoveJob move;
  PadJob<kPads> pad;
};

// A (token, k) of a source: of what it does not send, no more than that it is absent.
template <Pads kPads>
__device__ void land_pair(const SlotsJob<kPads>& job, int source, std::int64_t row, int k, const std::byte* record) {
  const MoveArgs& args = job.move.args;
  const HandleView& handle = args.handle;
  ReceivedPair pair;
  if (record != nullptr) pair = read_pair(record, k, handle.top_k);
  write_pair(handle, row, k, source, pair);
  count_pair(args, row, k, pair);
  const bool has_expert = pair.local_id >= 0 && pair.local_id < args.routing.local_experts;
  // A pad finds and places the others by the block of their expert, and counts them, unless where groups begin depends on it.
  if (kPads != Pads::none && !has_expert) handle.output_row[row * handle.top_k + k] = -1;
  const bool counts = kPads == Pads::none ? args.table.counts == nullptr : kPads == Pads::packed;
  if (counts && has_expert) atomicAdd(&handle.expert_counts[pair.local_id], 1);
  if (k != 0) return;
  if (pair.source_token >= 0) atomicAdd(&handle.rank_counts[source], 1);
  if (handle.present != nullptr) handle.present[row] = pair.source_token >= 0 ? 1 : 0;
}

// Every thread waits for what it lands, and first for block 0 to have begun, so that what it adds to is zero. Blocks take part from
// the last one on: the first ones have more to send.
template <Pads kPads>
__device__ void land_slots(const SlotsJob<kPads>& job, std::uint64_t call, const SlotsMemory& memory) {
  const MoveArgs& args = job.move.args;
  const Context& c = args.context;
  const auto top_k = args.cached ? 1U : static_cast<unsigned>(args.handle.top_k);
  const auto max_tokens = static_cast<unsigned>(c.shape.max_tokens_per_rank);
  const unsigned pairs = static_cast<unsigned>(c.ranks) * max_tokens * top_k;  // at most 2^31
  const std::byte* const records = receive_records(c, c.rank, args.buffer);
  const std::int64_t record_bytes = c.shape.record_bytes();
  const unsigned first = (gridDim.x - 1 - blockIdx.x) * kSlotThreads + threadIdx.x;
  if (!args.cached && first < pairs && !wait_for_own_begin(c, call)) return;
  for (unsigned at = first; at < pairs; at += gridDim.x * kSlotThreads) {
    const unsigned row = at / top_k;
    const int source = static_cast<int>(row / max_tokens);
    const unsigned token = row - static_cast<unsigned>(source) * max_tokens;
    const std::int32_t sent = peer_of(args, memory, source, call).tokens;
    const bool is_sent = static_cast<std::int32_t>(token) < sent;
    const bool is_last = static_cast<std::int32_t>(token) == sent - 1 && at % top_k == 0;
    const std::uint64_t* const word = arrival(c, c.rank, source, token);
    const Wait wait{.peer = source, .phase = Phase::dispatch_rows, .call = call, .timed = is_last};
    if (is_sent && !wait_for_word(c, word, protocol::flag_word(call), wait)) return;
    if (args.cached) continue;
    land_pair(job, source, row, static_cast<int>(at % top_k), is_sent ? records + row * record_bytes : nullptr);
  }
}

// By block 0: others learn of the call at once, this rank's own blocks when what they add to is zero.
__device__ bool begin_slots(const MoveArgs& args, const protocol::CallHeader& header, const CallState& state) {
  const Context& c = args.context;
  const HandleView& handle = args.handle;
  const std::uint32_t offer = protocol::offer(args.buffer, tokens_of(args));
  if (!begin_call(c, header, offer, state)) return false;
#pragma unroll 1
  for (int rank = threadIdx.x; !args.cached && rank <= args.context.ranks; rank += kSlotThreads) {
    handle.source_begin[rank] = static_cast<std::int32_t>(rank * args.context.shape.max_tokens_per_rank);
    if (rank < args.context.ranks) handle.rank_counts[rank] = handle.sent_counts[rank] = 0;
  }
#pragma unroll 1
  for (int local = threadIdx.x; !args.cached && local < args.routing.local_experts; local += kSlotThreads) {
    handle.expert_counts[local] = 0;
    handle.dropped[local] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) set_flag(c, of_call(Flag::begun, state.call), c.rank, state.call, offer);
  return true;
}

// By one warp.
template <Pads kPads>
__device__ void fill_header(const SlotsJob<kPads>& job, std::uint64_t call) {
  const MoveArgs& args = job.move.args;
  const Context& c = args.context;
  HandleView::Header header{.call = call, .num_tokens = args.routing.num_tokens};
  if (lane_index() == 0) take_id_counts(c, header);
  std::int32_t rows = 0, padded = 0;
#pragma unroll 1
  for (int rank = lane_index(); rank < c.ranks; rank += kLanes) rows += args.handle.rank_counts[rank];
#pragma unroll 1
  for (int local = lane_index(); kPads != Pads::none && local < args.routing.local_experts; local += kLanes) {
    const std::int32_t count = args.handle.expert_counts[local];
    padded += kPads == Pads::packed ? job.pad.packed_size(count) : count;
  }
  header.num_rows = header.layout_rows = __reduce_add_sync(kAllLanes, rows);
  if (kPads != Pads::none) header.layout_rows = __reduce_add_sync(kAllLanes, padded);
  if (lane_index() == 0) *args.handle.header = header;
}

// What a failed dispatch leaves: nothing.
__device__ void clear_handle(const MoveArgs& args) {
  const Context& c = args.context;
  const HandleView& handle = args.handle;
  const std::int64_t capacity = received_capacity(c, Mode::latency);
  clear_counts(c, handle, args.routing.num_tokens, args.routing.local_experts);
  clear_sent(c, handle, args.routing.num_tokens);
  clear_received(handle, capacity);
#pragma unroll 1
  for (std::int64_t i = threadIdx.x; handle.present != nullptr && i < capacity; i += kSlotThreads) handle.present[i] = 0;
  __syncthreads();
}

// By the last block of all. What the call needs to know is loaded by three warps at once.
template <Pads kPads>
__device__ void finish_slots(const SlotsJob<kPads>& job, std::uint64_t call) {
  const MoveArgs& args = job.move.args;
  const Context& c = args.context;
  if (threadIdx.x == 0) c.tickets[kLandedTicket] = 0;
  if (warp_index() == 1) add_link_bytes(c, args.handle.sent_counts, args.source.row_bytes + job.move.scales.row_bytes);
  if (warp_index() == 2 && !args.cached) fill_header(job, call);
  const bool failed = block_has_failed(c);
  if (failed && !args.cached) clear_handle(args);
  if (threadIdx.x == 0 && !args.cached) reset_id_counts(c);
  if (args.last) end_call(c, failed, call);
}

template <bool kQuantise, Pads kPads>
__global__ void __launch_bounds__(kSlotThreads, 1) dispatch_slots(const __grid_constant__ SlotsJob<kPads> job) {
  extern __shared__ SlotsStage stage[];
  __shared__ SlotsMemory memory;
  const MoveArgs& args = job.move.args;
  const Context& c = args.context;
  const CallState state = state_of_call(c);
  const protocol::CallHeader header = complete_header(args.header, args.handle);
  bool good = !state.failed;
  if (good && blockIdx.x == 0) good = begin_slots(args, header, state);
  good = good && send_tokens<kQuantise>(job.move, header, state.call, memory, stage);
  if (good) land_slots(job, state.call, memory);
  if constexpr (kPads != Pads::none) {
    __shared__ PadMemory pad_memory;
    if (good) count_sent(job.pad, pad_memory, [&](int source) { return peer_of(args, memory, source, state.call).tokens; });
    wait_for_blocks(c, kLandedTicket);
    if (!block_has_failed(c)) pad_experts(job.pad, args.routing.local_experts, pad_memory);
  }
  if (is_last_block(c, kEndTicket)) finish_slots(job, state.call);
}

const Preloaded preloaded({{dispatch_slots<false, Pads::none>},
                           {dispatch_slots<false, Pads::padded>},
                           {dispatch_slots<false, Pads::packed>},
                           {dispatch_slots<true, Pads::none>},
                           {dispatch_slots<true, Pads::padded>},
                           {dispatch_slots<true, Pads::packed>}});

template <Pads kPads>
void launch(const MoveArgs& args, const PadArgs& pad, Stream stream) {
  static_assert(kPadThreads == kSlotThreads && kMostPadPairs <= 1 << 16);
  const SlotsJob<kPads> job{.move = move_job(args), .pad = pad_job<kPads>(pad)};
  const std::size_t shared = args.source.quantise ? sizeof(SlotsStage) : 0;
  // A block for each token and one that announces, for each group to pad, or as many as share what may arrive.
  const protocol::ArenaShape& shape = args.context.shape;
  const std::int64_t pairs = shape.ranks * shape.max_tokens_per_rank * args.handle.top_k;
  const std::int64_t groups = kPads != Pads::none ? args.routing.local_experts : 0;
  const std::int64_t useful = std::max<std::int64_t>({args.routing.num_tokens + 1, (pairs + kSlotThreads - 1) / kSlotThreads, groups});
  const Launch start(static_cast<int>(std::min<std::int64_t>(args.blocks, useful)), kSlotThreads, shared, stream, Resident::together);
  start(args.source.quantise ? dispatch_slots<true, kPads> : dispatch_slots<false, kPads>, job);
}

}  // namespace

void launch_slots(const MoveArgs& args, const PadArgs& pad, Stream stream) {
  if (!pad.asked) return launch<Pads::none>(args, pad, stream);
  if (pad.spread.layout == Layout::expert_major) return launch<Pads::packed>(args, pad, stream);
  launch<Pads::padded>(args, pad, stream);
}

}  // namespace tokenyard::cuda
