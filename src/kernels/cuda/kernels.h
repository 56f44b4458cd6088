#pragma once
// The kernels of the exchange on GPUs, as the host starts them. Each launch function enqueues one kernel on `stream`; the
// caller asks cudaGetLastError(). Kernels of one exchange run one after the other; those of one call
// share its number, which lives in Context::state: the first kernel of a call announces it, the last one ends it.
// Once a call has failed (state->status, state->dead_call), its later kernels do nothing but end it.

#include <cstdint>

#include "kernels/cuda/context.h"
#include "protocol/device_scratch.h"
#include "tokenyard/options.h"

namespace tokenyard::cuda {

// [rows][columns] elements at any strides, in bytes.
struct Matrix {
  const std::byte* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t column_stride = 0;
};

// ---- dispatch: plan and move (throughput) or slots (latency), then the layout's kernels ----

// Routing of this rank's tokens.
struct RoutingArgs {
  Matrix ids;  // [T][K] int64 or int32
  bool wide_ids = true;
  Matrix weights;  // [T][K] float32; data null: 1
  std::int32_t num_tokens = 0;
  std::int32_t top_k = 1;
  std::uint32_t token_base = 0;
  // An id >= E or a weight that is no finite number is an error: sticky, FailureKind::mismatch at Phase::dispatch_counts with
  // expected = E and seen = the id, or expected = kNotFinite and seen = the token.
  bool validate = false;
  std::int32_t local_experts = 0;       // of this rank
  placement_internal::TableView table;  // device pointers
};

constexpr std::int64_t kNotFinite = -1;

// What must hold for every rank's counts, or the call is an overflow on all ranks.
struct LimitArgs {
  std::int64_t expert_capacity = 0;  // 0: none
  std::int64_t max_layout_rows = 0;  // expert_major with capacity; 0: none
  std::int32_t alignment = 1;
  bool drop = false;
  bool expert_layout = false;
};

// What the host reads, in pinned memory: written by the plan, before rows move. `call` last, release at system scope.
struct HostCounts {
  std::uint64_t call = 0;
  std::int32_t num_rows = 0;
  std::int32_t layout_rows = 0;
  std::int32_t map_rows = 0;  // length of the gather map
};

using protocol::kPlanChunk;

// A plan's slots in parts, as they are found: the slot of a row is base + before + number. Scratch, valid until the next plan.
struct RowNumbers {
  std::int32_t* number = nullptr;  // [M][R]: among the rows of its chunk for that rank, -1: none
  std::int32_t* before = nullptr;  // [ceil(M / kPlanChunk)][R]: rows of earlier chunks
  std::int32_t* base = nullptr;    // [R]: rows of lower ranks
};

// How often each local expert occurs in a chunk of received rows: added up as they land, read and cleared by their layout. Scratch.
struct LayoutTable {
  std::int32_t* counts = nullptr;  // [chunks][L + 1], the last column counts rows; zero between calls; null: no layout follows
  std::int32_t chunk_rows = 1;
  std::int32_t* sums = nullptr;  // of blocks with more than protocol::kMostSharedColumns
};

// How the rows of local experts lie in the output of a layout.
struct GroupArgs {
  Layout layout = Layout::token_major;
  std::int32_t alignment = 1;
  std::int64_t expert_capacity = 0;  // expert_padded: C; expert_major: 0 or a limit
  bool drop = false;
  std::int32_t local_experts = 0;
};

// Where this rank's own rows go at once, of expert layouts in throughput mode: to each of their places, not to where others' land.
struct OwnRows {
  std::byte* rows = nullptr;       // dense output on 16 bytes; null: own rows land as all others do
  GroupArgs groups;                // unless cached, with the next two: the move finds the places, as its layout will
  std::int32_t* counts = nullptr;  // scratch: [blocks that count tokens][L] how often a block's tokens ask for each local expert
  std::int32_t* places = nullptr;  // scratch: [T][K] output rows, -1: none; of a cached dispatch the handle has them by slot
};
constexpr int kFewestOwnBlocks = 32;  // for this rank's own rows: fewer would be busy with them for longer than the links (docs/kernels.md)

// What every kernel knows of a dispatch, and what only a plan reads.
struct PlanArgs {
  Context context;
  protocol::CallHeader header;  // call and handle_call are filled in by the kernel
  std::int32_t buffer = 0;      // the receive buffer this rank offers
  RoutingArgs routing;          // not read when cached
  HandleView handle;
  RowNumbers numbers;  // throughput mode, unless cached
  LimitArgs limits;
  std::int32_t* counts = nullptr;  // scratch: this rank's row of the count matrix, zero between plans
  HostCounts* host = nullptr;      // pinned
  OwnRows own;
};

// Warps of a block of a move that move no rows: enough to land what arrives before the last row does, on few multiprocessors, too.
constexpr int kClerks = 8;

// Whether clerks can find the places of own rows: they count them in the shared memory of a plan, which is over then.
constexpr int kPlaceWords = 4096;
inline bool can_place_own(const protocol::ArenaShape& shape) {
  return shape.count_words() <= protocol::kHistogramWords && protocol::layout_words(shape.max_local_experts + 1, kClerks) <= kPlaceWords;
}

// Rows as the caller has them; quantised on the way when asked.
struct SourceArgs {
  const std::byte* rows = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t row_bytes = 0;  // of what travels
  Matrix scales;               // [T][scale_columns] of scale_element bytes
  std::int32_t scale_columns = 0;
  std::int32_t scale_element = 0;  // bytes of one; 0: no scales
  bool quantise = false;
  ScaleFormat format = ScaleFormat::float32;
  Dtype dtype = Dtype::bfloat16;  // of rows, with quantise
  std::int32_t hidden_size = 0;   // with quantise
  std::int64_t scale_bytes() const { return std::int64_t{scale_columns} * scale_element; }
};

struct MoveArgs : PlanArgs {
  SourceArgs source;
  LayoutTable table;
  bool cached = false;  // slots are the handle's, no records travel
  bool last = false;    // ends the call
  int blocks = 1;       // of the grid: at most what may be resident at once beside everything else on the device
};

// From received rows to the rows and metadata of a layout: what Received shows beyond the handle's own arrays.
struct LayoutArgs : GroupArgs {
  Context context;
  HandleView handle;
  Mode mode = Mode::throughput;
  bool gather_map = false;
  std::int64_t output_rows = 0;  // of the layout's metadata arrays: N' or L * C at their bound
  std::int64_t map_rows = 0;     // of the gather map
  LayoutTable table;
  int landing_warps = 0;  // of the move in front of this layout, which begins when they have landed everything; 0: when that has ended
  bool last = false;
};

// Copies rows and scales from where they landed to their places in the output (handle.output_row; identity without it).
struct SpreadArgs {
  Context context;
  HandleView handle;
  std::int32_t buffer = 0;
  Layout layout = Layout::token_major;
  Mode mode = Mode::throughput;
  std::int64_t row_bytes = 0;
  std::int64_t scale_bytes = 0;
  std::byte* rows = nullptr;  // dense output
  std::byte* scales = nullptr;
  std::int64_t output_rows = 0;
  bool own_placed = false;    // this rank's own rows are in their places, their scales are not
  bool zero_padding = false;  // output rows without a source (handle.out_source_rank < 0) are zeroed
  int blocks = 1;
};

// Expert layouts in latency mode, laid out and copied by the kernel that lands the rows.
struct PadArgs {
  bool asked = false;  // else it is another layout, or left to launch_layout and launch_spread
  SpreadArgs spread;
  std::int64_t capacity = 0;   // expert_padded: C; expert_major: 0 or a limit
  std::int32_t alignment = 1;  // expert_major
  bool drop = false;
};
constexpr std::int64_t kMostPadRanks = 64;
constexpr std::int64_t kMostPadPairs = 65536;  // every block looks at all that were sent
inline bool can_pad(const protocol::ArenaShape& shape, int top_k) {
  return shape.ranks <= kMostPadRanks && shape.ranks * shape.max_tokens_per_rank * top_k <= kMostPadPairs;
}

// ---- combine ----

struct CombineArgs {
  Context context;
  protocol::CallHeader header;  // call and handle_call (handle.header->call) are filled in by the kernel
  HandleView handle;
  Layout layout = Layout::token_major;
  Mode mode = Mode::throughput;
  const std::byte* y = nullptr;   // rows in the layout of the dispatch; null: only row weights travel
  std::int64_t y_pitch = 0;       // bytes from row to row
  Dtype dtype = Dtype::bfloat16;  // float32, bfloat16, float16
  std::int32_t elements = 0;      // H
  Weighting weighting = Weighting::none;
  Order order = Order::rank_ascending;
  bool fold = true;
  bool pull = false;                             // y is this rank's expert_rows region, dense
  const std::int32_t* shard_ordinals = nullptr;  // [L]: this rank's place, ascending, among the shards of the replica it serves
  const std::int32_t* groups = nullptr;          // [R] reduction group of each rank; null: flat
  Matrix source_weights;                         // [T][K], at_source
  const float* row_weights = nullptr;            // dense, in the layout's shape ([i][K] or output rows)
  const std::byte* bias0 = nullptr;              // [T][H] of dtype
  const std::byte* bias1 = nullptr;
  std::int64_t bias0_pitch = 0;
  std::int64_t bias1_pitch = 0;
  std::byte* out = nullptr;  // [T][H]; null: only weights come back
  std::int64_t out_pitch = 0;
  Dtype out_dtype = Dtype::bfloat16;
  float* combined_weights = nullptr;  // [T][K] dense; null: not asked for
  int blocks = 1;                     // of the grid: at most what may be resident at once beside everything else on the device
  int own_blocks = 0;                 // of a push, beside those: they wait for nobody, and fold this rank's own rows into out, for the sum
};

// ---- launches ----
// Loads every kernel on the current device: loading later may wait for kernels that wait for peers.
void preload_kernels();
// This rank does not make the next call: peers that do fail with `reason` (pinned, kReasonBytes).
void launch_reject(const Context& context, const char* reason, Stream stream);
// Waits until peers have read what they pulled from here last: expert rows may be written again.
void launch_wait_reads(const Context& context, Stream stream);
// Within a combine, at_source: waits until every rank's weights are here.
void launch_wait_weights(const Context& context, Stream stream);
// Within a combine by push: waits until every rank's partial sums are here, so that the blocks that add them up wait for nobody.
void launch_wait_partials(const Context& context, Stream stream);
// Whether these rows go by bulk copies, so that MoveArgs::own may be used.
bool moves_in_bulk(const SourceArgs& source);
// Throughput: plans, unless cached; every row once to each of its ranks, into its slot, which the handle learns; then waits for every
// source, and turns its records into the handle's received rows [0, receive_rows).
void launch_move(const MoveArgs& args, Stream stream);
// Latency mode: moves, waits and lands in slots that need no plan; then pads, where asked.
void launch_slots(const MoveArgs& args, const PadArgs& pad, Stream stream);
void launch_layout(const LayoutArgs& args, Stream stream);
void launch_spread(const SpreadArgs& args, Stream stream);  // local, behind its call

void launch_combine_weights(const CombineArgs& args, Stream stream);  // at_source: this rank's weights go to where its rows went
void launch_combine_push(const CombineArgs& args, Stream stream);     // fold or copy, into the owners' staging
void launch_combine_sum(const CombineArgs& args, Stream stream);      // local: adds up all partial sums, which are here
void launch_combine_pull(const CombineArgs& args, Stream stream);     // sums straight from the peers' expert rows
void launch_combine_fused(const CombineArgs& args, Stream stream);    // push and sum in one kernel: small batches

// Gradients of a weighted combine on the expert rank, expert layouts: per output row r (of handle.output_row) with source weight w:
// row_gradient[r] = dot(g_r, y_r) in the lane order of cpu::dot, then g_r = round(w * g_r) in place. Other rows' gradient is 0.
struct DifferentiateArgs {
  HandleView handle;
  protocol::ArenaShape shape;
  const float* weights = nullptr;  // [receive_rows]: travelled weights, or weights_in of the arena (at_source)
  std::int32_t weights_pitch = 1;  // floats from row to row, K of them used
  std::byte* g = nullptr;
  std::int64_t g_pitch = 0;
  const std::byte* y = nullptr;
  std::int64_t y_pitch = 0;
  Dtype dtype = Dtype::bfloat16;
  std::int32_t elements = 0;
  float* row_gradient = nullptr;  // [output rows]
  std::int64_t output_rows = 0;
};
void launch_differentiate(const DifferentiateArgs& args, Stream stream);

}  // namespace tokenyard::cuda
