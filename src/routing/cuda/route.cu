// Gates: a warp for each token. Selection as in route.cc: the best first, ties to the lower id.

#include "core/preload.h"
#include "routing/cuda/row.cuh"

namespace tokenyard::routing_cuda {
namespace {

constexpr int kRouteArrays = 4;  // logits, scores, what is chosen by, scores of groups

struct Best {
  float score = kNever;
  int id = INT32_MAX;
};
__device__ __forceinline__ Best better(Best a, Best b) { return precedes(a.score, a.id, b.score, b.id) ? a : b; }

// The best of choice[begin, end), taken out of it; id INT32_MAX when nothing is left.
__device__ __forceinline__ Best take_best(float* choice, int begin, int end) {
  Best best;
  for (int e = begin + lane_index(); e < end; e += kWarp) {
    if (choice[e] != kNever) best = better(best, {choice[e], e});
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    best = better(best, {__shfl_xor_sync(kAllLanes, best.score, distance), __shfl_xor_sync(kAllLanes, best.id, distance)});
  }
  __syncwarp();
  if (lane_index() == 0 && best.id != INT32_MAX) choice[best.id] = kNever;
  __syncwarp();
  return best;
}

struct Chosen {
  float scores[kMaxTopK];
  int ids[kMaxTopK];
  float weights[kMaxTopK];
};

// A warp that routes tokens one after the other.
struct Router {
  const RouteArgs& args;
  Row& row;
  float* choice;
  Chosen& chosen;

  __device__ __forceinline__ void fill_choice() const {
    const GateArgs& of = args.of;
    for (int e = lane_index(); e < of.num_experts; e += kWarp) {
      const float logit = row.logits[e];
      float value = logit;
      if (of.gate.kind == GateKind::bias_corrected) {
        value = row.scores[e] + of.bias[e * of.bias_stride];
        if (!isfinite(value)) value = kNever;
      } else if (of.score == Score::sigmoid) {
        value = row.scores[e];
      }
      choice[e] = logit == kNever ? kNever : value;
    }
    __syncwarp();
  }
  // A group's best score, or with bias_corrected the sum of its two best.
  __device__ __forceinline__ float group_score(int group, int size) const {
    float first = kNever, second = kNever;
    for (int e = group * size; e < (group + 1) * size; ++e) {
      if (choice[e] > first) {
        second = first;
        first = choice[e];
      } else if (choice[e] > second) {
        second = choice[e];
      }
    }
    return args.of.gate.kind == GateKind::bias_corrected && second != kNever ? first + second : first;
  }
  // Keeps the topk_groups best groups eligible, ties to the lower group.
  __device__ __forceinline__ void exclude_groups(float* group_scores) const {
    const int groups = args.of.gate.num_groups, size = args.of.num_experts / groups;
    for (int g = lane_index(); g < groups; g += kWarp) group_scores[g] = group_score(g, size);
    __syncwarp();
    for (int g = lane_index(); g < groups; g += kWarp) {
      int before = 0;
      for (int other = 0; other < groups; ++other) before += precedes(group_scores[other], other, group_scores[g], g) ? 1 : 0;
      for (int e = g * size; before >= args.of.gate.topk_groups && e < (g + 1) * size; ++e) choice[e] = kNever;
    }
    __syncwarp();
  }
  __device__ __forceinline__ void put(int slot, Best best) const {
    if (lane_index() == 0) {
      chosen.ids[slot] = best.id == INT32_MAX ? -1 : best.id;
      chosen.scores[slot] = best.score;
    }
  }
  __device__ __forceinline__ void select() const {
    const Gate& gate = args.of.gate;
    fill_choice();
    if (gate.kind != GateKind::per_group) {
      if (gate.num_groups > 1) exclude_groups(choice + args.of.num_experts);
      for (int k = 0; k < gate.top_k; ++k) put(k, take_best(choice, 0, args.of.num_experts));
      __syncwarp();
      return;
    }
    const int size = args.of.num_experts / gate.num_groups, each = gate.top_k / gate.num_groups;
    for (int k = 0; k < gate.top_k; ++k) put(k, take_best(choice, k / each * size, (k / each + 1) * size));
    __syncwarp();
    order_chosen();
  }
  // The best of each group, into the order of all.
  __device__ __forceinline__ void order_chosen() const {
    constexpr int kMine = kMaxTopK / kWarp;
    const int top_k = args.of.gate.top_k;
    int slots[kMine], ids[kMine];
    for (int i = 0; i < kMine; ++i) {
      const int k = lane_index() + i * kWarp;
      if (k >= top_k) continue;
      ids[i] = chosen.ids[k];
      slots[i] = 0;
      for (int other = 0; other < top_k; ++other) {
        const bool is_before = ids[i] < 0
                                   ? chosen.ids[other] >= 0 || other < k
                                   : chosen.ids[other] >= 0 && precedes(chosen.scores[other], chosen.ids[other], chosen.scores[k], ids[i]);
        slots[i] += is_before ? 1 : 0;
      }
    }
    __syncwarp();
    for (int i = 0; i < kMine; ++i) {
      if (lane_index() + i * kWarp < top_k) chosen.ids[slots[i]] = ids[i];
    }
    __syncwarp();
  }
  __device__ __forceinline__ void read_given(std::int64_t token) const {
    for (int k = lane_index(); k < args.of.gate.top_k; k += kWarp) {
      const std::int64_t id = read_id(args.given, token, k);
      chosen.ids[k] = id < 0 || id >= args.of.num_experts ? -1 : static_cast<int>(id);
    }
    __syncwarp();
  }
  // Sums go in the order of slots.
  __device__ __forceinline__ void weigh() const {
    const Gate& gate = args.of.gate;
    float highest = kNever;
    for (int k = 0; k < gate.top_k; ++k) {
      if (chosen.ids[k] >= 0) highest = fmaxf(highest, row.logits[chosen.ids[k]]);
    }
    for (int k = lane_index(); k < gate.top_k; k += kWarp) {
      const int id = chosen.ids[k];
      chosen.weights[k] = id < 0 ? 0.0F : args.of.over_chosen ? exp_of_negative(row.logits[id] - highest) : row.scores[id];
    }
    __syncwarp();
    float sum = 0.0F;
    for (int k = 0; k < gate.top_k; ++k) {
      if (chosen.ids[k] >= 0) sum = sum + chosen.weights[k];
    }
    __syncwarp();
    const float divisor = sum + gate.epsilon;
    for (int k = lane_index(); k < gate.top_k; k += kWarp) {
      float weight = chosen.weights[k];
      if (gate.renormalise) weight = divisor > 0.0F ? weight / divisor : 0.0F;
      chosen.weights[k] = weight * gate.scale;
    }
  }
  __device__ __forceinline__ void write(std::int64_t token, bool is_routed) const {
    __syncwarp();
    for (int k = lane_index(); k < args.of.gate.top_k; k += kWarp) {
      const int id = is_routed ? chosen.ids[k] : -1;
      write_id(args.ids, token, k, id);
      args.weights[token * args.of.gate.top_k + k] = is_routed ? chosen.weights[k] : 0.0F;
      if (id >= 0) atomicAdd(args.load + id, 1ULL);
    }
  }
};

__global__ void route_kernel(const __grid_constant__ RouteArgs args) {
  constexpr int kMostWarps = 8;
  __shared__ Chosen chosen[kMostWarps];
  for_each_token(args.of, kRouteArrays, [&](std::int64_t token, Row& row, float* choice) {
    const Router router{args, row, choice, chosen[warp_index()]};
    const bool is_routed = row.load(token);
    if (is_routed) {
      if (!args.of.over_chosen) row.score(args.of.score);
      if (args.given.data != nullptr) {
        router.read_given(token);
      } else {
        router.select();
      }
      router.weigh();
    }
    router.write(token, is_routed);
  });
}

__global__ void update_bias_kernel(float* bias, const std::int64_t* load, int num_experts, float gamma) {
  __shared__ unsigned long long sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < num_experts; e += static_cast<int>(blockDim.x))
    atomicAdd(&sum, static_cast<unsigned long long>(load[e]));
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < num_experts; e += static_cast<int>(blockDim.x)) {
    const double excess = static_cast<double>(load[e]) * num_experts - static_cast<double>(static_cast<std::int64_t>(sum));
    if (excess > 0) bias[e] = bias[e] - gamma;
    if (excess < 0) bias[e] = bias[e] + gamma;
  }
}

const cuda::Preloaded preloaded({{route_kernel}, {update_bias_kernel}});

}  // namespace

void route(const RouteArgs& args, Stream stream) {
  cudaMemsetAsync(args.load, 0, static_cast<std::size_t>(args.of.num_experts) * sizeof(*args.load), stream);
  if (args.of.num_tokens == 0) return;
  const WarpLaunch launch(args.of, kRouteArrays);
  cudaFuncSetAttribute(route_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared);
  route_kernel<<<launch.blocks, launch.threads, launch.shared, stream>>>(args);
}

void update_gate_bias(float* bias, const std::int64_t* load, int num_experts, float gamma, Stream stream) {
  constexpr int kThreads = 1024;
  update_bias_kernel<<<1, kThreads, 0, stream>>>(bias, load, num_experts, gamma);
}

}  // namespace tokenyard::routing_cuda
