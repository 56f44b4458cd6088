// Gradients, statistics and losses of gates. Sums over tokens do not depend on the order in which tokens come.

#include "core/preload.h"
#include "routing/cuda/row.cuh"

namespace tokenyard::routing_cuda {
namespace {

constexpr double kFixedPoint = 1099511627776.0;  // 2^40: sums of integers are the same in any order
constexpr int kBlockThreads = 1024;

// How the weights of one token depend on its scores, and those on its logits; sums in the order of slots, as on the CPU.
struct WeightsGradient {
  float chosen[kMaxTopK];  // the scores that the weights are made of: 0 where there is none
  float d_chosen[kMaxTopK];

  __device__ __forceinline__ void load(const WeightsGradientArgs& args, const Row& row, std::int64_t token) {
    const int top_k = args.of.gate.top_k;
    float highest = kNever;
    for (int k = 0; k < top_k; ++k) {
      const std::int64_t id = read_id(args.ids, token, k);
      if (id >= 0 && id < args.of.num_experts) highest = fmaxf(highest, row.logits[id]);
    }
    for (int k = lane_index(); k < top_k; k += kWarp) {
      const std::int64_t id = read_id(args.ids, token, k);
      const bool is_none = id < 0 || id >= args.of.num_experts;
      chosen[k] = is_none ? 0.0F : args.of.over_chosen ? exp_of_negative(row.logits[id] - highest) : row.scores[id];
      d_chosen[k] = is_none ? 0.0F : args.of.gate.scale * args.d_weights[token * top_k + k];
    }
    __syncwarp();
  }
  // False when the weights are 0 whatever the logits.
  __device__ __forceinline__ bool differentiate(const Gate& gate) {
    if (!gate.renormalise) return true;
    float sum = 0.0F, product = 0.0F;
    for (int k = 0; k < gate.top_k; ++k) {
      sum = sum + chosen[k];
      product = product + chosen[k] * d_chosen[k];
    }
    const float divisor = sum + gate.epsilon;
    if (!(divisor > 0.0F)) return false;
    const float mean = product / divisor;
    __syncwarp();
    for (int k = lane_index(); k < gate.top_k; k += kWarp) d_chosen[k] = (d_chosen[k] - mean) / divisor;
    __syncwarp();
    return true;
  }
};

__global__ void weights_gradient_kernel(const __grid_constant__ WeightsGradientArgs args) {
  constexpr int kMostWarps = 8;
  __shared__ WeightsGradient gradients[kMostWarps];
  const bool is_sigmoid = args.of.score == Score::sigmoid;
  for_each_token(args.of, 2, [&](std::int64_t token, Row& row, float*) {
    if (!row.load(token)) return;
    if (!args.of.over_chosen) row.score(args.of.score);
    WeightsGradient& gradient = gradients[warp_index()];
    gradient.load(args, row, token);
    float* out = args.d_logits + token * args.of.num_experts;
    if (!gradient.differentiate(args.of.gate)) return;
    float dot = 0.0F;  // softmax: how much all scores shrink when one grows
    for (int k = 0; k < args.of.gate.top_k; ++k) {
      const std::int64_t id = read_id(args.ids, token, k);
      if (id < 0 || id >= args.of.num_experts) continue;
      const float product = gradient.d_chosen[k] * gradient.chosen[k];
      const float own = is_sigmoid ? product * sigmoid(-row.logits[id]) : product;
      if (lane_index() == 0) out[id] = out[id] + own;  // a replay may name an expert twice
      dot = dot + product;
    }
    __syncwarp();
    if (is_sigmoid || args.of.over_chosen) return;
    for (int e = lane_index(); e < args.of.num_experts; e += kWarp) out[e] = out[e] - row.scores[e] * dot;
  });
}

// Shares are added up as integers, in the place of the float64 sums that finish_statistics makes of them.
__global__ void statistics_kernel(const __grid_constant__ StatisticsArgs args) {
  auto* const sums = reinterpret_cast<unsigned long long*>(args.score_sums);
  for_each_token(args.of, 2, [&](std::int64_t token, Row& row, float*) {
    const bool counts = row.load(token);
    double log_sum = 0;
    if (counts) {
      row.score(args.of.score);
      const float inverse = row.inverse_sum();
      for (int e = lane_index(); e < args.of.num_experts; e += kWarp) {
        const auto share = static_cast<unsigned long long>(static_cast<double>(row.scores[e] * inverse) * kFixedPoint);
        if (share > 0) atomicAdd(sums + e, share);
      }
      log_sum = row.log_sum_exp();
      if (lane_index() == 0) atomicAdd(reinterpret_cast<unsigned long long*>(args.num_tokens), 1ULL);
    }
    if (lane_index() == 0) args.log_sum_exps[token] = log_sum;
  });
}

// The sum over a block's threads, in an order that does not change. For all threads.
__device__ __forceinline__ double sum_of_block(double value) {
  __shared__ double parts[kBlockThreads / kWarp];
  value = sum_across_lanes(value);
  __syncthreads();  // the last parts have been read
  if (lane_index() == 0) parts[warp_index()] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kBlockThreads / kWarp; ++warp) sum = sum + parts[warp];
  return sum;
}

__global__ void __launch_bounds__(kBlockThreads) finish_statistics_kernel(const __grid_constant__ StatisticsArgs args) {
  for (int e = static_cast<int>(threadIdx.x); e < args.of.num_experts; e += kBlockThreads) {
    args.load[e] = args.routed_load[e];
    args.score_sums[e] = static_cast<double>(reinterpret_cast<const unsigned long long*>(args.score_sums)[e]) / kFixedPoint;
  }
  double squares = 0;
  for (std::int64_t token = threadIdx.x; token < args.of.num_tokens; token += kBlockThreads) {
    squares = squares + args.log_sum_exps[token] * args.log_sum_exps[token];
  }
  squares = sum_of_block(squares);
  if (threadIdx.x == 0) *args.squared_log_sum_exps = squares;
}

// The number of (token, expert) pairs. For all threads of a block of kBlockThreads.
__device__ __forceinline__ double pairs_of(const LossArgs& args) {
  double pairs = 0;
  for (int e = static_cast<int>(threadIdx.x); e < args.of.num_experts; e += kBlockThreads)
    pairs = pairs + static_cast<double>(args.load[e]);
  return sum_of_block(pairs);
}

__global__ void __launch_bounds__(kBlockThreads) balance_loss_kernel(const __grid_constant__ LossArgs args) {
  const double pairs = pairs_of(args);
  double sum = 0;
  for (int e = static_cast<int>(threadIdx.x); e < args.of.num_experts; e += kBlockThreads) {
    sum = sum + static_cast<double>(args.load[e]) * args.score_sums[e];
  }
  sum = sum_of_block(sum);
  if (threadIdx.x != 0) return;
  const auto tokens = static_cast<double>(*args.num_tokens);
  *args.loss = pairs == 0 || tokens == 0 ? 0 : args.alpha * args.of.num_experts / pairs * sum / tokens;
}

__global__ void z_loss_kernel(const __grid_constant__ LossArgs args) {
  const auto tokens = static_cast<double>(*args.num_tokens);
  *args.loss = tokens == 0 ? 0 : args.alpha * *args.squared_log_sum_exps / tokens;
}

__global__ void balance_gradient_kernel(const __grid_constant__ LossArgs args) {
  const bool is_sigmoid = args.of.score == Score::sigmoid;
  double pairs = 0;  // by each warp for itself: the loads are few, and in the cache
  for (int e = lane_index(); e < args.of.num_experts; e += kWarp) pairs = pairs + static_cast<double>(args.load[e]);
  pairs = sum_across_lanes(pairs);
  const auto tokens = static_cast<double>(*args.num_tokens);
  if (pairs == 0 || tokens == 0) return;
  const auto d_score = [&](int e) {  // of every token: the loads are constants
    return static_cast<float>(args.alpha * args.of.num_experts * (static_cast<double>(args.load[e]) / pairs) / tokens);
  };
  for_each_token(args.of, 2, [&](std::int64_t token, Row& row, float*) {
    if (!row.load(token)) return;
    row.score(args.of.score);
    const float inverse = row.inverse_sum();
    float mean = 0.0F;
    for (int e = lane_index(); e < args.of.num_experts; e += kWarp) mean = mean + row.scores[e] * d_score(e);
    mean = sum_across_lanes(mean) * inverse;
    float* out = args.d_logits + token * args.of.num_experts;
    for (int e = lane_index(); e < args.of.num_experts; e += kWarp) {
      const float d = row.scores[e] * inverse * (d_score(e) - mean);
      out[e] = out[e] + (is_sigmoid ? d * sigmoid(-row.logits[e]) : d);
    }
  });
}

__global__ void z_gradient_kernel(const __grid_constant__ LossArgs args) {
  const auto tokens = static_cast<double>(*args.num_tokens);
  if (tokens == 0) return;
  for_each_token(args.of, 2, [&](std::int64_t token, Row& row, float*) {
    if (!row.load(token)) return;
    row.score(Score::softmax);
    const auto factor = static_cast<float>(2 * args.alpha * row.log_sum_exp() / tokens);
    float* out = args.d_logits + token * args.of.num_experts;
    for (int e = lane_index(); e < args.of.num_experts; e += kWarp) out[e] = out[e] + factor * row.scores[e];
  });
}

const cuda::Preloaded preloaded({{weights_gradient_kernel},
                                 {statistics_kernel},
                                 {finish_statistics_kernel},
                                 {balance_loss_kernel},
                                 {z_loss_kernel},
                                 {balance_gradient_kernel},
                                 {z_gradient_kernel}});

template <class Args>
void launch(void (*kernel)(Args), const Args& args, Stream stream) {
  if (args.of.num_tokens == 0) return;
  const WarpLaunch of(args.of, 2);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, of.shared);
  kernel<<<of.blocks, of.threads, of.shared, stream>>>(args);
}

}  // namespace

void add_weights_gradient(const WeightsGradientArgs& args, Stream stream) { launch(weights_gradient_kernel, args, stream); }

void gate_statistics(const StatisticsArgs& args, Stream stream) {
  cudaMemsetAsync(args.score_sums, 0, static_cast<std::size_t>(args.of.num_experts) * sizeof(double), stream);
  cudaMemsetAsync(args.num_tokens, 0, sizeof(std::int64_t), stream);
  launch(statistics_kernel, args, stream);
  finish_statistics_kernel<<<1, kBlockThreads, 0, stream>>>(args);
}

void balance_loss(const LossArgs& args, Stream stream) { balance_loss_kernel<<<1, kBlockThreads, 0, stream>>>(args); }
void z_loss(const LossArgs& args, Stream stream) { z_loss_kernel<<<1, 1, 0, stream>>>(args); }
void add_balance_gradient(const LossArgs& args, Stream stream) { launch(balance_gradient_kernel, args, stream); }
void add_z_gradient(const LossArgs& args, Stream stream) { launch(z_gradient_kernel, args, stream); }

}  // namespace tokenyard::routing_cuda
