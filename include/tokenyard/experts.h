#pragma once
// What experts compute, on CPUs: grouped matrix products and the gated feed-forward, forward and backward, on rows in any layout of
// a dispatch. Products and sums are float32 whatever the element type, each result is rounded once; they are reproducible on one
// machine with one number of threads (OMP_NUM_THREADS), not across machines. UsageError names the tensor that does not fit.
//
// L local experts, N received rows, P places, H hidden_size, I expert_width. Elements are float32, bfloat16 or float16, the same for
// rows and weights of one call; rows may be strided, weights are dense. Those of experts_forward may be float8_e4m3: see ExpertWeights.

#include <cstdint>
#include <vector>

#include "tokenyard/exchange.h"
#include "tokenyard/tensor_view.h"

namespace tokenyard {

// Which rows each local expert computes. Expert g has places begins[g] .. begins[g] + counts[g] - 1; the others are padding: never
// read, never written. Place p is row rows[p], or row p where `rows` is empty (the expert layouts).
struct RowGroups {
  std::int64_t places = 0;  // P
  std::vector<std::int64_t> begins;
  std::vector<std::int64_t> counts;
  std::vector<std::int64_t> rows;

  // expert_major [N',H] and expert_padded [L,C,H]: rows lie as places; token_major and rank_slots: gathered, nothing is copied before.
  static RowGroups of(const Received& received, int num_local_experts);
  // expert_major: counts [L], offsets [L+1], int32 or int64.
  static RowGroups of_offsets(const ConstTensorView& counts, const ConstTensorView& offsets);
  // expert_padded: counts [L].
  static RowGroups padded(const ConstTensorView& counts, std::int64_t capacity);
  // token_major, rank_slots: local_ids [.., K], negative for none; by local expert, then (row, k).
  static RowGroups gathered(const ConstTensorView& local_ids, int num_local_experts);
};

// Grouped products. x [N,K], w [L,M,K], bias [L,M] or none, y and dy [P,M], dx [P,K]; rows of padding stay as they are.
// y[p] = x[row of p] w[g]^T + bias[g]
void grouped_gemm(const ConstTensorView& x, const RowGroups& groups, const ConstTensorView& w, const ConstTensorView& bias,
                  const TensorView& y);
// dx[p] = dy[p] w[g]
void grouped_gemm_dgrad(const ConstTensorView& dy, const RowGroups& groups, const ConstTensorView& w, const TensorView& dx);
// dw[g] += sum over places p of g: dy[p]^T x[row of p]; dw [L,M,K] float32
void grouped_gemm_wgrad(const ConstTensorView& dy, const ConstTensorView& x, const RowGroups& groups, const TensorView& dw);

// From places to rows and back, for layouts that are gathered.
// out[p] = rows[row of p]; any dtype.
void permute(const ConstTensorView& rows, const RowGroups& groups, const TensorView& out);
// What a row's sum is made of.
struct FoldInput {
  ConstTensorView places{};       // [P,H]
  ConstTensorView local_ids{};    // [N,K] or [R,M,K] int32, as RowGroups::gathered got them
  ConstTensorView row_weights{};  // of the same shape, float32; none for 1
};
// out[n] = sum over k ascending of row_weights[n,k] * places[place of (n,k)], fused multiply-adds from +0 in float32, rounded once:
// the fold of combine, bit for bit. out [N,H], of the dtype of places; rows without a local expert become +0.
void unpermute(const FoldInput& input, const RowGroups& groups, const TensorView& out);
// d_places[p] = row_weight * d_out[row], rounded once; d_row_weights [N,K] float32, optional: <d_out[row], places[p]>, 0 without a
// local expert. d_out [N,H], d_places [P,H] and places are of one dtype. Without d_row_weights, input.places is not looked at.
void unpermute_backward(const FoldInput& input, const RowGroups& groups, const ConstTensorView& d_out, const TensorView& d_places,
                        const TensorView& d_row_weights);

enum class ActivationKind : std::uint8_t {
  silu,     // silu(gate) * up
  clamped,  // gpt-oss: g = min(gate, limit), u = clamp(up, -limit, limit); g * sigmoid(alpha * g) * (u + 1)
};
struct Activation {
  ActivationKind kind = ActivationKind::silu;
  float limit = 7.0F;
  float alpha = 1.702F;
};

struct ExpertWeights {
  ConstTensorView w13{};       // [L,2,I,H]: gate, up
  ConstTensorView w2{};        // [L,H,I]
  ConstTensorView w13_bias{};  // [L,2,I], optional
  ConstTensorView w2_bias{};   // [L,H], optional; with tensor parallelism on shard 0 alone
  // With w13 and w2 in float8_e4m3, and only then: float32, a scale for 128 x 128 elements, as DeepSeek-V3's checkpoints hold them.
  // Such weights go forward only; I is a multiple of 128 and H of 16.
  ConstTensorView w13_scale{};  // [L, 2, I / 128, ceil(H / 128)]
  ConstTensorView w2_scale{};   // [L, ceil(H / 128), I / 128]
};
// float32, added to; the biases' where the weights have them.
struct ExpertGradients {
  TensorView w13{}, w2{}, w13_bias{}, w2_bias{};
};
// What forward leaves for backward: gate and up before the activation, [P, 2I] float32.
struct ExpertActivations {
  std::vector<float> gate_up;
};

// y[p] = w2 act(w13 x[row of p] + w13_bias) + w2_bias, y [P,H]. `saved` may be nullptr.
void experts_forward(const ConstTensorView& x, const RowGroups& groups, const ExpertWeights& weights, const Activation& activation,
                     const TensorView& y, ExpertActivations* saved);
// What backward reads beside the weights.
struct ExpertBackwardInput {
  ConstTensorView x{};   // as given to forward
  ConstTensorView dy{};  // [P,H]
  const ExpertActivations* saved = nullptr;
};
// dx [P,H] by place (unpermute without weights sums it to rows).
void experts_backward(const ExpertBackwardInput& input, const RowGroups& groups, const ExpertWeights& weights, const Activation& activation,
                      const TensorView& dx, const ExpertGradients& gradients);

}  // namespace tokenyard
