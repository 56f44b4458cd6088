#pragma once
// The receiver's side of a handle: from records to arrays, and what a failed dispatch leaves.

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/kernels.h"
#include "protocol/record.h"

namespace tokenyard::cuda {

// Beside those of a move (land.cuh, plan.cuh), while which a layout runs.
enum LayoutTicket {
  kPlacedTicket = 40,  // blocks of the layout that are done
  kLandedTicket,       // warps of the move that have landed their share
};

// Of this rank.
__device__ inline std::int32_t tokens_of(const MoveArgs& args) {
  return args.cached ? args.handle.header->num_tokens : args.routing.num_tokens;
}

// Rows that the arrays of a handle have room for.
__device__ inline std::int64_t received_capacity(const Context& c, Mode mode) {
  return mode == Mode::latency ? c.shape.ranks * c.shape.max_tokens_per_rank : c.shape.receive_rows;
}

// One (row, k) of the received rows, on its way from the record to the handle.
struct ReceivedPair {
  std::int32_t source_token = -1;
  std::int32_t partial_slot = -1;
  std::int32_t local_id = -1;
  float weight = 0.0F;
};

__device__ inline ReceivedPair read_pair(const std::byte* record, int k, int top_k) {
  const protocol::Record from{const_cast<std::byte*>(record), top_k};
  ReceivedPair pair;
  pair.source_token = from.source_token();  // all loaded at once
  pair.partial_slot = from.partial_slot();
  pair.local_id = from.local_ids()[k];
  pair.weight = from.weights()[k];
  return pair.source_token < 0 ? ReceivedPair() : pair;
}

__device__ inline void write_pair(const HandleView& handle, std::int64_t row, int k, int source, const ReceivedPair& pair) {
  handle.local_ids[row * handle.top_k + k] = pair.local_id;
  handle.weights[row * handle.top_k + k] = pair.weight;
  if (k != 0) return;
  handle.source_token[row] = pair.source_token;
  handle.partial_slot[row] = pair.partial_slot;
  handle.source_rank[row] = pair.source_token >= 0 ? source : -1;
}

// Adds a pair to the counts that its layout begins with.
__device__ inline void count_pair(const MoveArgs& args, std::int64_t row, int k, const ReceivedPair& pair) {
  if (args.table.counts == nullptr || pair.source_token < 0) return;
  const int columns = args.routing.local_experts + 1;
  std::int32_t* const counts = args.table.counts + row / args.table.chunk_rows * columns;
  if (pair.local_id >= 0 && pair.local_id < args.routing.local_experts) atomicAdd(&counts[pair.local_id], 1);
  if (k == 0) atomicAdd(&counts[args.routing.local_experts], 1);
}

// What a dispatch that failed leaves: nothing was sent and nothing arrived. By the threads of one block.
__device__ inline void clear_counts(const Context& c, const HandleView& handle, std::int32_t num_tokens, int local_experts) {
  for (int rank = threadIdx.x; rank <= c.ranks; rank += blockDim.x) {
    handle.source_begin[rank] = 0;
    if (rank == c.ranks) break;
    handle.rank_counts[rank] = 0;
    handle.sent_counts[rank] = 0;
  }
  for (int local = threadIdx.x; local < local_experts; local += blockDim.x) {
    handle.expert_counts[local] = 0;
    handle.dropped[local] = 0;
  }
  if (threadIdx.x == 0) *handle.header = {.call = call_number(c), .num_tokens = num_tokens};
}

__device__ inline void clear_sent(const Context& c, const HandleView& handle, std::int32_t num_tokens) {
  const std::int64_t count = static_cast<std::int64_t>(num_tokens) * c.ranks;
  for (std::int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    handle.slots[i] = -1;
    handle.k_masks[i] = 0;
  }
}

__device__ inline void clear_received(const HandleView& handle, std::int64_t capacity) {
  for (std::int64_t i = threadIdx.x; i < capacity * handle.top_k; i += blockDim.x) {
    write_pair(handle, i / handle.top_k, static_cast<int>(i % handle.top_k), -1, {});
  }
}

// A row of an expert layout that nothing goes to.
__device__ inline void clear_output(const HandleView& handle, std::int64_t row) {
  handle.out_weights[row] = 0.0F;
  handle.out_source_rank[row] = -1;
  handle.out_source_token[row] = -1;
  handle.out_source_k[row] = -1;
}

// Tells the host what it shapes outputs by. By one thread; release: publishes the numbers before `call`.
__device__ inline void tell_host(HostCounts* host, std::uint64_t call, const HandleView::Header& header, std::int32_t map_rows) {
  if (host == nullptr) return;
  host->num_rows = header.num_rows;
  host->layout_rows = header.layout_rows;
  host->map_rows = map_rows;
  __threadfence_system();
  ptx::store_release(&host->call, call);
}

}  // namespace tokenyard::cuda
