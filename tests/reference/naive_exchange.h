#pragma once
// What dispatch and combine must produce, for all ranks at once, in the plainest words: the oracle of the exchange tests.
// Shares no code with the library, so that a common error cannot hide.

#include <cstdint>
#include <optional>
#include <vector>

#include "reference/naive_numbers.h"

namespace tokenyard::naive {

struct Copy {
  std::vector<int> shard_ranks = {};
  std::uint32_t share = 1;
};
struct Placement {
  int ranks = 1;
  std::vector<std::vector<Copy>> experts = {};  // the copies of each expert
};
std::vector<int> local_experts(const Placement& placement, int rank);

// What one rank gives to dispatch. ids [tokens,K]; scales and weights may be empty.
struct Input {
  std::int64_t tokens = 0;
  Bytes rows = {};
  Bytes scales = {};
  std::vector<std::int64_t> ids = {};
  std::vector<float> weights = {};
};

struct DispatchSpec {
  Layout layout = Layout::token_major;
  int top_k = 1;
  std::int64_t row_bytes = 16;
  std::int64_t scale_bytes = 0;
  std::int64_t max_tokens = 0;  // M
  std::int64_t receive_rows = 0;
  std::int64_t expert_capacity = 0;  // C; 0: receive_rows in expert_padded, no limit in expert_major
  bool drop = false;
  int alignment = 1;
  std::int64_t token_base = 0;
};

// One (token, k) that has an instance on a rank, in order (source, token, k). Slot -1: dropped.
struct Term {
  int source = 0;
  std::int64_t token = 0;
  int k = 0;
  int local = 0;
  std::int64_t slot = 0;
};

// What one rank receives. Names and shapes are those of Received; vectors that a layout does not have are empty.
struct Output {
  std::int64_t token_rows = 0;     // N of the handle
  std::int64_t num_rows = 0;       // of Received
  std::int64_t slots = 0;          // rows that the layout has when nothing is left over: N | N' | L*C | R*M
  std::vector<std::uint8_t> used;  // [slots]: a row was received here; elsewhere its bytes are unspecified
  Bytes rows;
  Bytes scales;
  std::vector<std::int32_t> local_ids, source_rank, source_token, source_k;
  std::vector<float> row_weights;
  std::vector<std::int32_t> expert_counts, expert_offsets, expert_rows, rank_counts, sent_counts, ranges;
  std::vector<std::uint8_t> present;
  std::vector<std::int64_t> dropped;
  std::vector<Term> terms;
  bool overflow = false;  // rows exceed receive_rows, or an expert its capacity without drop
};
// inputs: one per rank. Every layout's outputs, also where a rank overflows (then as if nothing did).
std::vector<Output> dispatch(const Placement& placement, const std::vector<Input>& inputs, const DispatchSpec& spec);

struct CombineSpec {
  Dtype dtype = Dtype::float32;
  Dtype out_dtype = Dtype::float32;
  std::int64_t hidden_size = 0;
  Weighting weighting = Weighting::none;
  Order order = Order::rank_ascending;
  bool fold = true;
  bool row_weights = false;      // every rank gives them, so combined_weights come back
  std::vector<int> groups = {};  // of each rank; empty: one
};
// What one rank gives to combine. y [slots, hidden_size] in the layout of the dispatch.
struct CombineInput {
  Bytes y;
  std::vector<float> row_weights;     // shaped as Output::row_weights
  std::vector<float> source_weights;  // [tokens,K], at_source
  Bytes bias0, bias1;                 // optional
};
struct CombineOutput {
  Bytes out;                            // [tokens, hidden_size]
  std::vector<float> combined_weights;  // [tokens,K]
};
// What is shared by combine and the backward pair.
struct Dispatched {
  const DispatchSpec& spec;
  const std::vector<Input>& inputs;
  const std::vector<Output>& outputs;
};
std::vector<CombineOutput> combine(const Dispatched& dispatched, const std::vector<CombineInput>& inputs, const CombineSpec& spec);

// Backward of combine: grad_rows per slot (unspecified where not used), and the gradient of the weights.
struct CombineGradient {
  Bytes rows;                  // [slots, hidden_size]
  std::vector<float> weights;  // [tokens,K] of this rank as a source
};
// grads: the gradient of each rank's out, [tokens, hidden_size] in spec.dtype; inputs: those of the combine.
std::vector<CombineGradient> combine_backward(const Dispatched& dispatched, const std::vector<Bytes>& grads,
                                              const std::vector<CombineInput>& inputs, const CombineSpec& spec);

}  // namespace tokenyard::naive
