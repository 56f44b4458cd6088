#pragma once
// What a norm does to one element, wherever it runs. Sums over a row are each engine's own.

#include "protocol/host_device.h"

namespace tokenyard::layer_internal {

// `inverse`: 1 / sqrt(mean(row^2) + epsilon).
constexpr TY_HOST_DEVICE float normed(float value, float inverse, float weight) { return value * inverse * weight; }

// scaled: weight * d_out; mean: of scaled * value over the row, times inverse^2.
constexpr TY_HOST_DEVICE float norm_gradient(float scaled, float value, float inverse, float mean) {
  return inverse * (scaled - value * mean);
}

}  // namespace tokenyard::layer_internal
