#pragma once
// Residual + RMSNorm, alone and together with the collectives around it: how a decoder layer passes from tensor-parallel attention to
// the MoE layer and back. Of the T tokens of an attention group of g ranks, rank r holds the slice t_r = T / g + (r < T % g), which may
// be empty; it takes part all the same.
//
//   attention (partial sums [T,H]) -> reduce_scatter_norm -> MoeLayer on the slice [t_r,H] -> norm_all_gather -> next attention [T,H]
//
// Rows are float32, bfloat16 or float16, one dtype per call; sums are float32. residual_out = x + bias + residual, rounded once;
// out = residual_out * weight / sqrt(mean(residual_out^2) + epsilon), of the rounded residual_out, rounded once.
// Source: "Root Mean Square Layer Normalization" (arXiv 1910.07467), eq. 4. UsageError names the tensor that does not fit.

#include <cstdint>
#include <vector>

#include "tokenyard/collective.h"
#include "tokenyard/tensor_view.h"

namespace tokenyard {

// [ranks]: the slices of `tokens` tokens.
std::vector<std::int64_t> slice_counts(std::int64_t tokens, int ranks);

struct RmsNorm {
  ConstTensorView weight{};  // [H] float32, bfloat16 or float16
  float epsilon = 1e-6F;
};
struct ResidualInput {
  ConstTensorView x{};         // [t,H]
  ConstTensorView residual{};  // [t,H], optional
  ConstTensorView bias{};      // [H], optional, of x's dtype
};
// Where both results go, [t,H] each. residual_out may be x or residual; out may be x.
struct NormOutput {
  TensorView residual{};
  TensorView out{};
  TensorView inverse{};  // [t] float32, optional, of forward: 1 / sqrt(mean(residual_out^2) + epsilon), which backward can take
};
void residual_norm(const ResidualInput& input, const RmsNorm& norm, const NormOutput& output);
// x [T,H] partial sums of this rank: summed over the ranks, of which this rank's slice goes on. Output [t_r,H]; output.out is memory of
// its own, in which the sums lie first.
void reduce_scatter_norm(Collectives& collectives, const ResidualInput& input, const RmsNorm& norm, const NormOutput& output);
// x [t_r,H] of this rank's slice; output.residual [t_r,H], output.out [T,H]: of all slices, in rank order.
void norm_all_gather(Collectives& collectives, const ResidualInput& input, const RmsNorm& norm, const NormOutput& output);

struct NormGradient {
  ConstTensorView residual{};    // [t,H]: residual_out of forward
  ConstTensorView d_residual{};  // [t,H], optional: the gradient of residual_out from where else it was used
  ConstTensorView d_out{};       // [t,H]
  ConstTensorView inverse{};     // [t] float32, optional: as forward left it
};
// d_x [t,H], which is the gradient of x and of residual alike (and, summed over rows, of the bias); d_weight [H] float32, optional,
// added to. d_x may be d_residual or d_out.
void residual_norm_backward(const NormGradient& input, const RmsNorm& norm, const TensorView& d_x, const TensorView& d_weight);
// d_out [t_r,H]. d.out [T,H]: the gradient of every rank's partial sums; d.residual [t_r,H]: that of the residual (and of the bias).
void reduce_scatter_norm_backward(Collectives& collectives, const NormGradient& input, const RmsNorm& norm, const NormOutput& d,
                                  const TensorView& d_weight);
// d_out [T,H]: what this rank made of the gathered rows; summed over the ranks. d_x [t_r,H].
void norm_all_gather_backward(Collectives& collectives, const NormGradient& input, const RmsNorm& norm, const TensorView& d_x,
                              const TensorView& d_weight);

// The same on GPUs: with a stream (a cudaStream_t), all tensors are in the memory of one GPU, and kernels are enqueued there. Nothing is
// waited for and nothing allocated, so that all of them can be captured in a graph. Results are those of CPUs within rounding; one machine
// and one build give the same bits every time. d_weight needs NormGradient::inverse. UsageError also without TY_CUDA; TransportError tells
// what CUDA refused, and as in collective.h.
void residual_norm(const ResidualInput& input, const RmsNorm& norm, const NormOutput& output, void* stream);
void reduce_scatter_norm(DeviceCollectives& collectives, const ResidualInput& input, const RmsNorm& norm, const NormOutput& output,
                         void* stream);
void norm_all_gather(DeviceCollectives& collectives, const ResidualInput& input, const RmsNorm& norm, const NormOutput& output,
                     void* stream);
void residual_norm_backward(const NormGradient& input, const RmsNorm& norm, const TensorView& d_x, const TensorView& d_weight,
                            void* stream);
void reduce_scatter_norm_backward(DeviceCollectives& collectives, const NormGradient& input, const RmsNorm& norm, const NormOutput& d,
                                  const TensorView& d_weight, void* stream);
// d_x is not d_residual: the sums of d_out lie there first.
void norm_all_gather_backward(DeviceCollectives& collectives, const NormGradient& input, const RmsNorm& norm, const TensorView& d_x,
                              const TensorView& d_weight, void* stream);

}  // namespace tokenyard
