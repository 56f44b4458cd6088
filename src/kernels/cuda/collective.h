#pragma once
// The kernels of the collective exchange on GPUs: they count, pack and add up, and something else moves the rows between GPUs.
// Each launch function enqueues one kernel on `stream`; the caller asks cudaGetLastError().
//
// Per call: plan, then counts travel; pack, and the host learns the counts; rows and records travel; land.

#include "kernels/cuda/kernels.h"
#include "protocol/host_device.h"

namespace tokenyard::cuda {

constexpr int kCollectiveChunk = 256;  // tokens that are numbered at once

// Where this rank's tokens go, in device memory. W words per rank: rows, then rows of each of its local experts.
struct CollectivePlan {
  std::int32_t* slots = nullptr;          // [T][R]: number of the row among those of its chunk to that rank, -1: none
  std::int32_t* chunk_begin = nullptr;    // [chunks][R]: rows to that rank from earlier chunks
  std::int32_t* counts = nullptr;         // [R][R][W]: what each rank sends to each; this rank's part is zero between calls
  std::int32_t* sent_begin = nullptr;     // [R]: where each rank's rows begin in the packed ones, without this rank's own
  std::int32_t* receive_begin = nullptr;  // [R+1]: where each source's rows begin
  std::uint32_t* ticket = nullptr;        // zero between kernels
  int rank = 0;
  int ranks = 1;
  int words = 1;  // W

  TY_HOST_DEVICE std::int64_t words_per_rank() const { return std::int64_t{ranks} * words; }
  TY_HOST_DEVICE std::int32_t* mine() const { return counts + rank * words_per_rank(); }
  TY_HOST_DEVICE std::int32_t* sent(int to) const { return mine() + to * words; }
  TY_HOST_DEVICE std::int32_t* received(int from) const { return counts + from * words_per_rank() + rank * words; }
};

struct CollectivePlanArgs {
  CollectivePlan plan;
  RoutingArgs routing;
};
void launch_collective_plan(const CollectivePlanArgs& args, Stream stream);

// What the host waits for, in pinned memory: behind it rows [R] that this rank sends, and rows [R] that it receives. `call` last,
// release at system scope.
struct CollectiveCounts {
  std::uint64_t call = 0;
  TY_HOST_DEVICE std::int32_t* rows() { return reinterpret_cast<std::int32_t*>(this + 1); }
};

// Rows, scales and records: one table each.
struct CollectiveTables {
  std::byte* rows = nullptr;
  std::byte* scales = nullptr;
  std::byte* records = nullptr;  // protocol::Record, of 8 + 8 K bytes
};

struct CollectivePackArgs {
  CollectivePlan plan;
  RoutingArgs routing;
  SourceArgs source;
  std::uint64_t call = 0;
  CollectiveCounts* host = nullptr;
  CollectiveTables packed;    // by destination, without this rank's own
  CollectiveTables received;  // this rank's own rows go here at once
};
void launch_collective_pack(const CollectivePackArgs& args, Stream stream);

struct CollectiveLandArgs {
  CollectivePlan plan;
  const std::byte* records = nullptr;
  std::int32_t num_rows = 0;
  std::int32_t top_k = 1;
  std::int32_t local_experts = 0;
  std::int32_t* source_rank = nullptr;    // [N]
  std::int32_t* source_token = nullptr;   // [N]
  std::int32_t* local_ids = nullptr;      // [N][K]
  float* weights = nullptr;               // [N][K]
  std::int32_t* expert_counts = nullptr;  // [L]
  std::int32_t* rank_counts = nullptr;    // [R]
  std::int32_t* sent_counts = nullptr;    // [R]
};
void launch_collective_land(const CollectiveLandArgs& args, Stream stream);

// Sums of the rows that came back, ranks ascending, in float32, rounded once.
struct CollectiveSumArgs {
  CollectivePlan plan;
  std::int32_t num_tokens = 0;
  const std::byte* returned = nullptr;  // as packed, dense
  const std::byte* own = nullptr;       // this rank's own rows, dense
  std::int32_t row_bytes = 0;           // a multiple of 16
  Dtype dtype = Dtype::bfloat16;        // float32, bfloat16, float16
  std::byte* out = nullptr;             // [T], each at a multiple of 16
  std::int64_t out_pitch = 0;
  Dtype out_dtype = Dtype::bfloat16;
};
void launch_collective_sum(const CollectiveSumArgs& args, Stream stream);

// out[i] = sum over ranks, ascending, rounded once; float64 in float64, the others in float32. Any alignment of an element.
struct OrderedSumArgs {
  const std::byte* own = nullptr;     // the term of `rank`; may be out
  const std::byte* others = nullptr;  // [ranks][elements], that of `rank` unused
  int rank = 0;
  int ranks = 1;
  std::int64_t elements = 0;
  Dtype dtype = Dtype::float32;  // float64, float32, bfloat16, float16
  std::byte* out = nullptr;
};
void launch_ordered_sum(const OrderedSumArgs& args, Stream stream);

}  // namespace tokenyard::cuda
