#pragma once
// What device_experts.cc enqueues. A failed launch is the runtime's last error.

#include "experts/cuda/scaled.h"
#include "tokenyard/experts.h"

namespace tokenyard::experts_cuda {

// Products of any shape, type and alignment, on tensor cores where the type has them.
void grouped_product(const GroupedArgs& args, int num_sms, Stream stream);

void fill_group_table(const GroupedArgs& args, const GroupTable& table, Stream stream);
// One file each; chosen by hopper_kernel(). run: false when CUTLASS refused.
struct HopperKernel {
  std::size_t (*workspace_bytes)(const HopperArgs&) = nullptr;
  bool (*run)(const HopperArgs&) = nullptr;
  std::size_t (*other_workspace_bytes)(const HopperArgs&) = nullptr;  // of the kernel for other numbers of rows, if there is one
};
HopperKernel forward_bf16();
HopperKernel forward_fp16();
HopperKernel forward_few_bf16();
HopperKernel forward_few_fp16();
HopperKernel forward_narrow_bf16();
HopperKernel forward_narrow_fp16();
HopperKernel dgrad_bf16();
HopperKernel dgrad_fp16();
HopperKernel dgrad_narrow_bf16();
HopperKernel dgrad_narrow_fp16();
HopperKernel wgrad_bf16();
HopperKernel wgrad_fp16();

// Products of float8 rows and weights, by the type of y. Likewise; chosen by scaled_kernel().
struct ScaledKernel {
  std::size_t (*workspace_bytes)(const ScaledArgs&) = nullptr;
  bool (*run)(const ScaledArgs&) = nullptr;
};
ScaledKernel forward_fp8_to_bf16();
ScaledKernel forward_fp8_to_fp16();
ScaledKernel forward_fp8_pairs_to_bf16();
ScaledKernel forward_fp8_pairs_to_fp16();

// to[p] = from[rows[p]], rows of row_bytes; padding is left as it is. Row numbers outside [0, num_rows) give zeros.
struct PermuteArgs {
  Groups groups;
  const std::int32_t* rows = nullptr;
  std::int64_t num_rows = 0;
  const std::byte* from = nullptr;
  std::int64_t from_stride = 0;  // bytes
  std::byte* to = nullptr;
  std::int64_t to_stride = 0;
  std::int64_t row_bytes = 0;
};
void permute(const PermuteArgs& args, Stream stream);

// Zeros into rows of padding.
struct PaddingArgs {
  Groups groups;
  std::byte* rows = nullptr;
  std::int64_t stride = 0;  // bytes
  std::int64_t row_bytes = 0;
};
void clear_padding(const PaddingArgs& args, Stream stream);

// Groups from the local experts of each row: counts, begins (ascending, without padding), and the row of each place.
struct GatherArgs {
  const std::int32_t* local_ids = nullptr;  // [num_ids]
  std::int64_t num_ids = 0;
  int top_k = 1;
  int num_groups = 0;
  std::int32_t* counts = nullptr;  // [groups]
  std::int32_t* begins = nullptr;  // [groups]
  std::int32_t* rows = nullptr;    // [num_ids]
};
void gather_groups(const GatherArgs& args, Stream stream);

struct FoldArgs {
  Groups groups;
  const std::int32_t* rows = nullptr;       // [places]
  const std::int32_t* local_ids = nullptr;  // [num_rows, top_k]
  const float* row_weights = nullptr;       // the same; none for 1
  std::int64_t num_rows = 0;
  int top_k = 1;
  std::int32_t* place_of = nullptr;  // [num_rows, top_k] scratch: -1 where there is none
  Dtype dtype = Dtype::bfloat16;
  std::int64_t columns = 0;
  const std::byte* places = nullptr;
  std::int64_t places_stride = 0;  // elements
  const std::byte* d_out = nullptr;
  std::byte* out = nullptr;  // [num_rows] rows
  std::int64_t out_stride = 0;
  std::byte* d_places = nullptr;
  std::int64_t d_places_stride = 0;
  float* d_row_weights = nullptr;
};
void find_places(const FoldArgs& args, Stream stream);
void unpermute(const FoldArgs& args, Stream stream);
void unpermute_backward(const FoldArgs& args, Stream stream);

struct ActivationArgs {
  Groups groups;
  Activation activation;
  Dtype dtype = Dtype::bfloat16;
  int width = 0;
  const std::byte* gate_up = nullptr;  // [places, 2, width]
  const std::byte* d_act = nullptr;    // [places, width]
  std::byte* act = nullptr;            // [places, width]
  std::byte* d_gate_up = nullptr;      // [places, 2, width]
};
void activate(const ActivationArgs& args, int num_sms, Stream stream);

// Rows by place, dense: [places, columns] float8_e4m3, columns a multiple of 4, and [places, blocks()] float32.
struct QuantisedRows {
  std::byte* values = nullptr;
  float* scales = nullptr;
  std::int64_t columns = 0;
  constexpr std::int64_t blocks() const { return scale_blocks(columns); }
};
// to[p] = rows[row of p]; padding is left as it is. Row numbers outside [0, num_rows) give zeros.
struct QuantiseArgs {
  Groups groups;
  const std::int32_t* rows = nullptr;  // none: rows lie as places
  std::int64_t num_rows = 0;
  Dtype dtype = Dtype::bfloat16;  // or float16
  const std::byte* from = nullptr;
  std::int64_t from_stride = 0;  // elements
  QuantisedRows to;
};
void quantise(const QuantiseArgs& args, int num_sms, Stream stream);
// The activation, of gate_up in bfloat16 or float16, rounded once: to float8 in `to` instead of act. The width is a multiple of 128.
void activate_quantised(const ActivationArgs& args, const QuantisedRows& to, int num_sms, Stream stream);

// act again, and d_gate_up.
void activate_backward(const ActivationArgs& args, int num_sms, Stream stream);

// sums[g, c] += over places of g: values[place, c].
struct ColumnSumArgs {
  Groups groups;
  Dtype dtype = Dtype::bfloat16;
  std::int64_t columns = 0;
  const std::byte* values = nullptr;
  std::int64_t stride = 0;  // elements
  float* sums = nullptr;
};
void add_column_sums(const ColumnSumArgs& args, Stream stream);

}  // namespace tokenyard::experts_cuda
