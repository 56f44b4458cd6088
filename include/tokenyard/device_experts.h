#pragma once
// What experts compute, on GPUs: the functions of experts.h on tensors in device memory, enqueued on a stream. Group sizes stay on
// the device: no call waits for it, and once every shape has been seen nothing is allocated, so that all of them can be captured in
// a graph. Sums are float32; every result is rounded once to its tensor's type, gate_up and act in between, too. One machine and one
// build give the same bits every time.
//
// L local experts, N rows, P places, H hidden_size, I expert_width. Rows and weights are float32, bfloat16 or float16, the same in
// one call; rows may be strided, weights are dense. UsageError names the tensor that does not fit; TransportError tells what CUDA
// refused. Hopper's tensor cores are used (builds with TY_CUTLASS) for bfloat16 and float16 where pointers and row strides are
// multiples of 16 bytes; anything else takes the kernels that run everywhere.

#include <cstdint>
#include <memory>

#include "tokenyard/experts.h"

namespace tokenyard {

// RowGroups of which the host knows the sizes of tensors and no more. Tables are int32 in device memory; their numbers are not
// checked, since nobody waits for them: places outside [0, P) and rows outside [0, N) are left out, respectively read as zeros.
struct DeviceRowGroups {
  std::int64_t places = 0;   // P: as many as there can be
  ConstTensorView counts{};  // [L]
  ConstTensorView begins{};  // [L] or [L+1], ascending; none: expert g begins at g * capacity
  std::int64_t capacity = 0;
  ConstTensorView rows{};  // [P] or more; none: rows lie as places
  // How many places are probably taken: few rows per expert have kernels of their own. 0: all. Results do not depend on it.
  std::int64_t likely = 0;

  // Of a dispatch on cuda, with as many places likely as this rank has sent rows to experts. UsageError for token_major without a gather
  // map, and for rank_slots: use DeviceExperts::gather.
  static DeviceRowGroups of(const Received& received);
};

struct DeviceExpertsOptions {
  int device = -1;    // -1: the current one
  int sm_margin = 0;  // multiprocessors that the products leave to kernels beside them
};

// Holds scratch memory. Its calls run in the order in which they are made, so all of one object go to one stream, or to streams that
// are ordered; `stream` is a cudaStream_t. UsageError where a call inside a graph capture would have to allocate.
class DeviceExperts {
 public:
  // UsageError where the build has no device code, or the device is not there.
  explicit DeviceExperts(const DeviceExpertsOptions& options = {});
  ~DeviceExperts();
  DeviceExperts(DeviceExperts&&) noexcept;
  DeviceExperts& operator=(DeviceExperts&&) noexcept;

  // As RowGroups::gathered: local_ids [.., K] int32 on the device, P = its number of elements. The tables are this object's, and
  // valid until the next gather.
  DeviceRowGroups gather(const ConstTensorView& local_ids, int num_local_experts, void* stream);

  void grouped_gemm(const ConstTensorView& x, const DeviceRowGroups& groups, const ConstTensorView& w, const ConstTensorView& bias,
                    const TensorView& y, void* stream);
  void grouped_gemm_dgrad(const ConstTensorView& dy, const DeviceRowGroups& groups, const ConstTensorView& w, const TensorView& dx,
                          void* stream);
  void grouped_gemm_wgrad(const ConstTensorView& dy, const ConstTensorView& x, const DeviceRowGroups& groups, const TensorView& dw,
                          void* stream);

  // float8_e4m3 with block scales, as dispatch delivers rows (one float32 scale for 128 elements) and DeepSeek's checkpoints hold
  // weights (one for 128 x 128): sums of 128 products are scaled and added in float32. x [N,K], scales [N, ceil(K/128)] dense; w [L,M,K],
  // scales [L, ceil(M/128), ceil(K/128)]; bias and y bfloat16 or float16; K a multiple of 16, M of 8, rows of x 16 bytes aligned.
  // UsageError on GPUs other than Hopper's, and without TY_CUTLASS.
  struct Scaled {
    ConstTensorView values{};
    ConstTensorView scales{};
  };
  void grouped_gemm_scaled(const Scaled& x, const DeviceRowGroups& groups, const Scaled& w, const ConstTensorView& bias,
                           const TensorView& y, void* stream);

  // Zeros into the rows [P,M] of padding, of any dtype; the others stay as they are.
  void clear_padding(const DeviceRowGroups& groups, const TensorView& rows, void* stream);

  // Groups with `rows`, as all of these.
  void permute(const ConstTensorView& rows, const DeviceRowGroups& groups, const TensorView& out, void* stream);
  // Bit for bit what the CPU gives.
  void unpermute(const FoldInput& input, const DeviceRowGroups& groups, const TensorView& out, void* stream);
  void unpermute_backward(const FoldInput& input, const DeviceRowGroups& groups, const ConstTensorView& d_out, const TensorView& d_places,
                          const TensorView& d_row_weights, void* stream);

  // `gate_up` [P, 2I] of x's dtype, dense, for backward, or none. Products of float8_e4m3 weights (see ExpertWeights) are those of
  // grouped_gemm_scaled, with y and biases bfloat16 or float16, without gate_up: x is of y's dtype, and its rows become float8, or it is
  // float8_e4m3 with x_scales [N, ceil(H/128)] float32, dense. The activation becomes float8 with scales as quantise() makes them.
  struct Forward {
    ConstTensorView x{};
    TensorView gate_up{};
    ConstTensorView x_scales{};
  };
  void experts_forward(const Forward& input, const DeviceRowGroups& groups, const ExpertWeights& weights, const Activation& activation,
                       const TensorView& y, void* stream);
  struct Backward {
    ConstTensorView x{};        // as given to forward
    ConstTensorView gate_up{};  // as forward left it
    ConstTensorView dy{};       // [P,H]
    TensorView dx{};            // [P,H]
    ExpertGradients gradients{};
  };
  void experts_backward(const Backward& call, const DeviceRowGroups& groups, const ExpertWeights& weights, const Activation& activation,
                        void* stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tokenyard
