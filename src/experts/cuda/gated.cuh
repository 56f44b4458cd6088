#pragma once
// The gated activation of one pair of numbers, and its derivatives.

#include "tokenyard/experts.h"

namespace tokenyard::experts_cuda {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0F, 1.0F + __expf(-x)); }

// The clamps keep a NaN, as those of the CPU do.
struct Gated {
  Activation activation;

  __device__ __forceinline__ bool is_silu() const { return activation.kind == ActivationKind::silu; }
  __device__ __forceinline__ float clamped_gate(float gate) const { return gate > activation.limit ? activation.limit : gate; }
  __device__ __forceinline__ float clamped_up(float up) const {
    return up > activation.limit ? activation.limit : up < -activation.limit ? -activation.limit : up;
  }
  __device__ __forceinline__ float value(float gate, float up) const {
    if (is_silu()) return gate * sigmoid(gate) * up;
    const float g = clamped_gate(gate);
    return g * sigmoid(activation.alpha * g) * (clamped_up(up) + 1.0F);
  }
  // d becomes the gradient of gate; returned is that of up. Where a clamp holds, nothing passes.
  __device__ __forceinline__ float differentiate(float gate, float up, float& d) const {
    const float g = is_silu() ? gate : clamped_gate(gate);
    const float u = is_silu() ? up : clamped_up(up) + 1.0F;
    const float alpha = is_silu() ? 1.0F : activation.alpha;
    const float s = sigmoid(alpha * g);
    const float d_up = is_silu() || fabsf(up) <= activation.limit ? d * g * s : 0.0F;
    d = is_silu() || gate <= activation.limit ? d * u * s * (1.0F + alpha * g * (1.0F - s)) : 0.0F;
    return d_up;
  }
};

}  // namespace tokenyard::experts_cuda
