#pragma once
// The enumerations and options of an exchange. Every option is named at the call: {.layout = Layout::expert_major}.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenyard/quantise.h"
#include "tokenyard/tensor_view.h"

namespace tokenyard {

enum class Mode : std::uint8_t { throughput, latency };
enum class Layout : std::uint8_t { token_major, expert_major, expert_padded, rank_slots };
enum class Sizing : std::uint8_t { exact, capacity };
enum class Order : std::uint8_t { rank_ascending, topk };
enum class Weighting : std::uint8_t { none, at_input, at_expert, at_source };
enum class Transport : std::uint8_t { automatic, inproc, shm, mpi, cuda_peer, nccl, nccl_window };
enum class Device : std::uint8_t { cpu, cuda };

std::string_view name(Mode mode);
std::string_view name(Layout layout);
std::string_view name(Sizing sizing);
std::string_view name(Order order);
std::string_view name(Weighting weighting);
std::string_view name(Transport transport);
std::string_view name(Device device);
Mode parse_mode(std::string_view text);
Layout parse_layout(std::string_view text);
Sizing parse_sizing(std::string_view text);
Order parse_order(std::string_view text);
Weighting parse_weighting(std::string_view text);
Transport parse_transport(std::string_view text);
Device parse_device(std::string_view text);

// The maximum shape of an exchange. The same on all ranks (checked at construction; a mismatch names both values).
struct ExchangeOptions {
  std::int64_t max_tokens_per_rank = 0;  // M
  std::int64_t max_row_bytes = 0;        // of one row, either way; a multiple of 16
  std::int64_t max_scale_bytes = 0;      // of one row's scales
  int top_k = 1;                         // most experts per token, <= 64
  int max_local_experts = 1;             // L of the fullest rank, over all placements
  int max_fanout = 1;                    // most TP shards of a replica, over all placements
  std::int64_t receive_rows = 0;         // rows a rank can receive at once; 0: ranks x max_tokens_per_rank, the bound
  std::int64_t max_expert_rows = 0;      // rows of expert_major with Sizing::capacity; 0: receive_rows x top_k + padding, the bound
  int depth = 2;                         // receive buffers, so dispatches whose rows may be alive at once
  bool expert_rows = false;              // also owns memory from which combine pulls without a copy (Exchange::expert_rows)
  bool unfolded = false;                 // staging for combine with fold = false
  std::vector<int> reduction_groups{};   // group of each rank, ascending from 0; empty: one flat group
  Mode mode = Mode::throughput;          // default of dispatch
  Transport transport = Transport::automatic;
  Device device = Device::cpu;  // where rows are: all tensors of all calls are in that memory
  int device_index = -1;        // cuda: the GPU of this rank; -1: the current device; may differ between ranks
  // nccl_window: an ncclComm_t over exactly these ranks, of the library that TOKENYARD_NCCL names, on every rank or on none. It outlives
  // the exchange, and nothing else calls on it while an exchange is made or goes. Null: the exchange makes one, also when it recovers.
  void* nccl_communicator = nullptr;
  int sm_budget = 0;     // cuda: SMs that kernels may take while they wait for peers; 0: see Exchange::options()
  int num_threads = 1;   // threads that move rows on this rank; may differ between ranks
  bool validate = true;  // check ids and weights by value; off: an id >= E counts as no expert; cuda: a bad one is a sticky error
  bool trace = false;    // keep phase spans for Exchange::take_spans; cuda: events between the kernels, which cost a few us
  int timeout_ms = 0;    // deadline of every wait; 0: the world's (TOKENYARD_TIMEOUT_MS)
};

struct DispatchInput {
  ConstTensorView rows{};          // [T,H]: any dtype, or [T,row_bytes] uint8; rows contiguous, row stride free
  ConstTensorView scales{};        // [T,S], optional, any strides
  ConstTensorView topk_ids{};      // [T,K] int64 or int32, or [T] when K = 1; negative: no expert
  ConstTensorView topk_weights{};  // [T,K] float32, optional (absent: weights 1)
};

// Device memory of the caller for [rows, row_bytes] and [rows, scale_bytes]; it stays until the rows of the dispatch are released.
struct OutMemory {
  void* rows = nullptr;
  void* scales = nullptr;
};

struct DispatchOptions {
  std::optional<int> placement{};  // what Exchange::add returned; default: the first one added
  Layout layout = Layout::token_major;
  Sizing sizing = Sizing::exact;
  std::optional<Mode> mode{};        // default: the exchange's
  bool gather_map = false;           // token_major: also expert_rows and expert_offsets
  int alignment = 1;                 // expert_major: each group starts at a multiple; power of two <= 256
  bool zero_padding = false;         // expert layouts: padding rows are zeroed (else unspecified)
  std::int64_t expert_capacity = 0;  // C of expert_padded (0: receive_rows); a limit per expert for expert_major (0: none)
  bool drop = false;                 // rows beyond expert_capacity are dropped and counted instead of an overflow
  bool copy_out = false;             // rows go to memory of the caller (out_rows) or of the Received, not a lease
  TensorView out_rows{};             // with copy_out, optional: where rows go
  TensorView out_scales{};
  // cuda, with copy_out: asked for memory when the number of rows is known, on the thread that finishes the dispatch.
  std::function<OutMemory(std::int64_t rows, std::int64_t row_bytes, std::int64_t scale_bytes)> allocate_out{};
  std::int64_t token_base = 0;            // shifts the replica choice, see Placement::replica_for
  std::optional<ScaleFormat> quantise{};  // rows bfloat16/float16/float32 in, fp8 and scales out
  // [R] int64, optional: how many nanoseconds this call waits for each rank is added, see PeerWaits; also by every replay of a graph. Not
  // over MPI. A call that fails may have added less.
  TensorView waits{};
  void* stream = nullptr;  // cuda: the cudaStream_t that made the input, and on which the output becomes valid
};

struct CombineOptions {
  Weighting weighting = Weighting::none;
  Order order = Order::rank_ascending;
  bool fold = true;                  // false: every (token, k) row crosses on its own, summed k ascending
  ConstTensorView source_weights{};  // [T,K] float32, with Weighting::at_source
  ConstTensorView row_weights{};     // float32: [N,K] (token_major), [R,M,K] (rank_slots), [N'] / [L,C] (expert layouts)
  ConstTensorView bias0{};           // [T,H] in y's dtype
  ConstTensorView bias1{};
  TensorView out{};        // [T,H]: where sums go, and their dtype; absent: memory of the result, y's dtype
  TensorView waits{};      // as in DispatchOptions
  void* stream = nullptr;  // cuda: as in DispatchOptions
};

}  // namespace tokenyard
