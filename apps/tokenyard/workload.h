#pragma once
// What the ranks of a benchmark or check feed to an exchange. Every rank's input can be regenerated anywhere from the seed, row by
// row: a receiver knows what it should have got without asking the sender.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tokenyard/exchange.h"
#include "tokenyard/routing.h"

namespace tokenyard::cli {

enum class IdPattern : std::uint8_t {
  drawn,       // by the gate, from random logits over a Zipf popularity
  none,        // every id -1
  one_expert,  // everything to expert 0, further choices -1
  duplicates,  // all choices of a token are the same expert
};

struct Workload {
  std::uint64_t seed = 1;
  std::uint64_t popularity_seed = 1;  // apart from seed: input sets of one run share their popular experts
  std::vector<std::int64_t> tokens;   // [R]
  std::int64_t hidden_size = 0;
  Dtype dtype = Dtype::bfloat16;  // float8_e4m3 rows bring float32 scales, one per 128 elements
  int num_experts = 1;
  Gate gate;        // its top_k is the workload's
  double skew = 0;  // exponent of the experts' popularity; 0: uniform
  IdPattern pattern = IdPattern::drawn;

  int ranks() const { return static_cast<int>(tokens.size()); }
  int top_k() const { return gate.top_k; }
  std::int64_t row_bytes() const { return hidden_size * size_of(dtype); }
  std::int64_t scale_columns() const { return dtype == Dtype::float8_e4m3 ? (hidden_size + 127) / 128 : 0; }
  // What experts and combine work in: dtype, or bfloat16 when rows are fp8.
  Dtype expert_dtype() const { return is_summable(dtype) ? dtype : Dtype::bfloat16; }
};

// Zipf: the i-th most popular expert has popularity (i + 1)^-skew; which one that is depends on the seed.
std::vector<double> popularity(int num_experts, double skew, std::uint64_t seed);

// Row and scales of one token. Every element has at most 8 significant bits and a magnitude of 2^-3 .. 2^1, so that sums of
// some of them are exact in float32.
void fill_row(const Workload& workload, int rank, std::int64_t token, std::byte* row);
void fill_scales(const Workload& workload, int rank, std::int64_t token, float* scales);
Routing draw_routing(const Workload& workload, int rank);

// One rank's input.
struct Batch {
  std::vector<std::byte> rows;
  std::vector<float> scales;
  Routing routing;
  DispatchInput input;  // views of the above
};
Batch make_batch(const Workload& workload, int rank);

// Elements as numbers, and back with one rounding.
void decode(Dtype dtype, const std::byte* row, std::vector<float>& values);
void encode(Dtype dtype, const std::vector<float>& values, std::byte* row);
// The nearest value that `dtype` can hold.
float rounded(Dtype dtype, double value);

}  // namespace tokenyard::cli
