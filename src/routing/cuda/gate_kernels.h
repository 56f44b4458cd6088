#pragma once
// What device_route.cc enqueues. Trivially copyable arguments; a failed launch is the runtime's last error.

#include <cstddef>
#include <cstdint>

#include "tokenyard/routing.h"

struct CUstream_st;

namespace tokenyard::routing_cuda {

using Stream = CUstream_st*;  // a cudaStream_t

// RoutingInput and Gate as kernels read them; strides in elements.
struct GateArgs {
  std::int64_t num_tokens = 0;
  int num_experts = 0;
  Gate gate;
  Score score = Score::softmax;
  bool over_chosen = false;  // the weights are a softmax over the chosen
  Dtype dtype = Dtype::float32;
  const std::byte* logits = nullptr;
  std::int64_t token_stride = 0, expert_stride = 0;
  const float* bias = nullptr;
  std::int64_t bias_stride = 0;
  const std::uint8_t* mask = nullptr;
  std::int64_t mask_stride = 0;
};

// Ids of either width.
struct Ids {
  std::byte* data = nullptr;
  bool is_wide = false;
  std::int64_t row_stride = 0, k_stride = 0;
};

struct RouteArgs {
  GateArgs of;
  Ids given;  // data: nullptr for none
  Ids ids;
  float* weights = nullptr;
  unsigned long long* load = nullptr;
};
void route(const RouteArgs& args, Stream stream);

struct WeightsGradientArgs {
  GateArgs of;
  Ids ids;
  const float* d_weights = nullptr;
  float* d_logits = nullptr;
};
void add_weights_gradient(const WeightsGradientArgs& args, Stream stream);

struct StatisticsArgs {
  GateArgs of;
  const std::int64_t* routed_load = nullptr;
  std::int64_t* load = nullptr;
  double* score_sums = nullptr;
  double* squared_log_sum_exps = nullptr;
  std::int64_t* num_tokens = nullptr;
  double* log_sum_exps = nullptr;
};
void gate_statistics(const StatisticsArgs& args, Stream stream);

struct LossArgs {
  GateArgs of;  // only num_experts for the losses themselves
  double alpha = 0;
  const std::int64_t* load = nullptr;
  const double* score_sums = nullptr;
  const double* squared_log_sum_exps = nullptr;
  const std::int64_t* num_tokens = nullptr;
  double* loss = nullptr;
  float* d_logits = nullptr;
};
void balance_loss(const LossArgs& args, Stream stream);
void z_loss(const LossArgs& args, Stream stream);
void add_balance_gradient(const LossArgs& args, Stream stream);
void add_z_gradient(const LossArgs& args, Stream stream);

void update_gate_bias(float* bias, const std::int64_t* load, int num_experts, float gamma, Stream stream);

}  // namespace tokenyard::routing_cuda
