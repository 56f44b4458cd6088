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

}  // namespace tokenyard::layer_cuda
