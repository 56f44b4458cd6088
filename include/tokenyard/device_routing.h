#pragma once
// Gates on GPUs: the functions of routing.h on tensors in device memory, enqueued on a stream (a cudaStream_t) of the current device.
// No call waits or allocates, so all can be captured in a graph. Ids, weights and loads are those of the CPU bit for bit; gradients
// and statistics are the same bits every time, and the CPU's within rounding. UsageError as there, and without TY_CUDA;
// TransportError tells what CUDA refused.
//
// Where the CPU would refuse a number that only the device knows (a given id >= E), it counts as none.

#include "tokenyard/routing.h"

namespace tokenyard {

struct DeviceRouting {
  TensorView topk_ids{};      // [T,K] int64 or int32, dense
  TensorView topk_weights{};  // [T,K] float32, dense
  TensorView load{};          // [E] int64
};
void route(const RoutingInput& input, const Gate& gate, const DeviceRouting& routing, void* stream);

// d_weights [T,K] and d_logits [T,E] float32, dense; added to.
void add_weights_gradient(const RoutingInput& input, const Gate& gate, const DeviceRouting& routing, const ConstTensorView& d_weights,
                          const TensorView& d_logits, void* stream);

// GateStatistics, each number where a collective can add it up over a group.
struct DeviceGateStatistics {
  TensorView load{};                  // [E] int64
  TensorView score_sums{};            // [E] float64; each token's share is rounded to a multiple of 2^-40, so that order does not matter
  TensorView squared_log_sum_exps{};  // [1] float64
  TensorView num_tokens{};            // [1] int64
  TensorView log_sum_exps{};          // [T] float64, of this rank's tokens; 0 for those that do not count
};
void gate_statistics(const RoutingInput& input, const Gate& gate, const DeviceRouting& routing, const DeviceGateStatistics& statistics,
                     void* stream);

// loss [1] float64.
void balance_loss(const DeviceGateStatistics& statistics, double alpha, const TensorView& loss, void* stream);
void z_loss(const DeviceGateStatistics& statistics, double alpha, const TensorView& loss, void* stream);
void add_balance_gradient(const RoutingInput& input, const Gate& gate, const DeviceGateStatistics& statistics, double alpha,
                          const TensorView& d_logits, void* stream);
void add_z_gradient(const RoutingInput& input, const Gate& gate, const DeviceGateStatistics& statistics, double alpha,
                    const TensorView& d_logits, void* stream);

// bias [E] float32, load [E] int64.
void update_gate_bias(const TensorView& bias, const ConstTensorView& load, float gamma, void* stream);

}  // namespace tokenyard
