#pragma once
// What a forward on a GPU leaves for its backward, beside the rows that it received.

#include <memory>

#include "tokenyard/device_routing.h"

namespace tokenyard::layer_internal {

struct CudaStep {
  std::shared_ptr<std::byte> memory;  // of all that follows
  std::int64_t bytes = 0;
  std::int64_t num_tokens = -1;
  TensorView logits{};  // [T,E] float32
  DeviceRouting routing{};
  TensorView gate_up{};         // [P, 2I]
  TensorView y{};               // [P,H]: of the experts, before the fold
  TensorView shared_gate_up{};  // [T, 2I] of the shared expert
  TensorView shared_y{};        // [T,H], before the sigmoid
};

}  // namespace tokenyard::layer_internal
