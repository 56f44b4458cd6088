#pragma once
// What the layer enqueues itself on GPUs. Trivially copyable arguments; a failed launch is the runtime's last error.

#include <cstddef>
#include <cstdint>

#include "tokenyard/dtype.h"

struct CUstream_st;

namespace tokenyard::layer_cuda {

using Stream = CUstream_st*;  // a cudaStream_t

// logits [T,E] = x [T,H] w^T + bias, w [E,H] dense; the three of any floating type each.
struct GateProductArgs {
  std::int64_t num_tokens = 0;
  int num_experts = 0;
  int hidden_size = 0;
  Dtype x_dtype = Dtype::float32, w_dtype = Dtype::float32, bias_dtype = Dtype::float32;
  const std::byte* x = nullptr;
  std::int64_t x_stride = 0;  // in elements
  const std::byte* w = nullptr;
  const std::byte* bias = nullptr;  // [E] or none
  float* logits = nullptr;          // dense
  float* parts = nullptr;           // gate_parts_bytes()
};
// Few tokens make few tiles: then several blocks share one, each a part of H, and their sums are added in their order.
std::int64_t gate_parts_bytes(int multiprocessors);
void gate_product(const GateProductArgs& args, int multiprocessors, Stream stream);

// Rows of one type, strides in elements.
struct RowsArgs {
  std::int64_t num_rows = 0;
  std::int64_t columns = 0;
  Dtype dtype = Dtype::float32;
  const std::byte* a = nullptr;
  std::int64_t a_stride = 0;
  const std::byte* b = nullptr;
  std::int64_t b_stride = 0;
  std::byte* out = nullptr;
  std::int64_t out_stride = 0;
};
// out = b * sigmoid(<a, gate>), gate [H] of any floating type. out may be b.
void scale_by_gate(const RowsArgs& args, const std::byte* gate, Dtype gate_dtype, Stream stream);
// out = a + b, rounded once. out may be one of them.
void add_rows(const RowsArgs& args, Stream stream);

// total = the sum of counts, each at least 0 and `most` at the most.
void add_counts(const std::int32_t* counts, int ranks, std::int64_t most, std::int32_t* total, Stream stream);

// out [rows, columns] = or += sum over terms of a(row, term) b(term, column); out dense.
struct FactorsArgs {
  std::int64_t rows = 0, columns = 0, terms = 0;
  const float* a = nullptr;
  std::int64_t a_row_stride = 0, a_term_stride = 0;
  const std::byte* b = nullptr;
  std::int64_t b_stride = 0;  // of terms, in elements
  Dtype b_dtype = Dtype::float32;
  float* out = nullptr;
  bool accumulates = false;
};
void product_of_factors(const FactorsArgs& args, Stream stream);
// out [columns] += the sum of values [rows, columns].
void add_column_sums(const float* values, std::int64_t rows, std::int64_t columns, float* out, Stream stream);

// Of y * sigmoid(<x, gate>): d_y = d_out * sigmoid, d_logits [num_rows] of the scalar products. y and d_y dense.
struct SigmoidGradientArgs {
  std::int64_t num_rows = 0, columns = 0;
  Dtype dtype = Dtype::float32, gate_dtype = Dtype::float32;
  const std::byte* x = nullptr;
  std::int64_t x_stride = 0;
  const std::byte* d_out = nullptr;
  std::int64_t d_out_stride = 0;
  const std::byte* y = nullptr;
  const std::byte* gate = nullptr;
  std::byte* d_y = nullptr;
  float* d_logits = nullptr;
};
void differentiate_sigmoid(const SigmoidGradientArgs& args, Stream stream);

// Of rows that are folded by weights: of each place, d_weights = <g, y>, and g *= weight. All dense.
struct WeighGradientArgs {
  const std::int32_t* num_places = nullptr;  // on the device
  std::int64_t max_places = 0, columns = 0;
  Dtype dtype = Dtype::float32;
  std::byte* g = nullptr;
  const std::byte* y = nullptr;
  const float* weights = nullptr;
  float* d_weights = nullptr;
};
void differentiate_weights(const WeighGradientArgs& args, int multiprocessors, Stream stream);

// out = rows + of_gate + of_shared + d_logits gate, rounded once; all but out dense.
struct SumGradientsArgs {
  std::int64_t num_rows = 0, columns = 0;
  Dtype dtype = Dtype::float32, gate_dtype = Dtype::float32;
  const std::byte* rows = nullptr;
  const float* of_gate = nullptr;        // optional
  const std::byte* of_shared = nullptr;  // optional
  const float* d_logits = nullptr;       // [num_rows] and [columns]: with a gate of the shared expert
  const std::byte* gate = nullptr;
  std::byte* out = nullptr;
  std::int64_t out_stride = 0;
};
void add_gradients(const SumGradientsArgs& args, Stream stream);

// kept = x + bias + residual, rounded; out = kept * weight * inverse, rounded; inverse = 1 / sqrt(mean(kept^2) + epsilon). kept may be x or
// residual, out may be x.
struct NormArgs {
  std::int64_t num_rows = 0, columns = 0;
  Dtype dtype = Dtype::float32, weight_dtype = Dtype::float32;
  float epsilon = 0.0F;
  const std::byte* x = nullptr;
  std::int64_t x_stride = 0;
  const std::byte* residual = nullptr;  // optional
  std::int64_t residual_stride = 0;
  const std::byte* bias = nullptr;  // [columns] of dtype, optional
  const std::byte* weight = nullptr;
  std::byte* kept = nullptr;
  std::int64_t kept_stride = 0;
  std::byte* out = nullptr;
  std::int64_t out_stride = 0;
  float* inverse = nullptr;  // [num_rows], optional
};
void norm_rows(const NormArgs& args, Stream stream);

struct NormGradientArgs {
  std::int64_t num_rows = 0, columns = 0;
  Dtype dtype = Dtype::float32, weight_dtype = Dtype::float32;
  float epsilon = 0.0F;
  const std::byte* kept = nullptr;
  std::int64_t kept_stride = 0;
  const std::byte* d_out = nullptr;
  std::int64_t d_out_stride = 0;
  const std::byte* d_residual = nullptr;  // optional
  std::int64_t d_residual_stride = 0;
  const std::byte* weight = nullptr;
  const float* inverse = nullptr;  // [num_rows], with d_weight
  std::byte* d_x = nullptr;        // may be d_residual or d_out
  std::int64_t d_x_stride = 0;
  float* d_weight = nullptr;  // [columns], optional, added to
};
void differentiate_norm(const NormGradientArgs& args, Stream stream);

}  // namespace tokenyard::layer_cuda
