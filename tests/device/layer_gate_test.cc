// The gate's product against sums in float64: on tensor cores and without, whole and in parts, edges that fill no tile, strided rows.

#include <gtest/gtest.h>

#include "device/experts_side.h"
#include "device/gpus.h"
#include "layer/cuda/kernels.h"
#include "memory/sm_budget.h"

namespace tokenyard::device_test {
namespace {

using testing::SeededRandom;

struct GateCase {
  std::int64_t tokens;
  int experts, hidden;
  Dtype x, w;
  std::int64_t gap = 0;  // elements between rows of x
  bool has_bias = false;
};

// Elements of result rows that are looked at.
std::vector<std::int64_t> some_of(std::int64_t count, SeededRandom& random) {
  if (count <= 70) {
    std::vector<std::int64_t> all(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int64_t>(i);
    return all;
  }
  std::vector<std::int64_t> some = {0, 63, 64, count - 1};
  for (int i = 0; i < 20; ++i) some.push_back(random.between(0, count - 1));
  return some;
}

void check(const GateCase& c) {
  SCOPED_TRACE(std::to_string(c.tokens) + " x " + std::to_string(c.experts) + " x " + std::to_string(c.hidden) + ", " +
               std::string(name(c.x)) + " by " + std::string(name(c.w)));
  SeededRandom random;
  Uploads upload;
  const Buffer x = Buffer::random(random, c.x, c.tokens, c.hidden + c.gap), w = Buffer::random(random, c.w, c.experts, c.hidden),
               bias = Buffer::random(random, Dtype::float32, 1, c.experts);
  Buffer logits = Buffer::nan(Dtype::float32, c.tokens, c.experts, 0);
  const TensorView on_gpu = upload(logits);
  const int multiprocessors = multiprocessors_of(0);
  const DeviceBuffer parts = value_or_throw(make_device_buffer(0, static_cast<std::size_t>(layer_cuda::gate_parts_bytes(multiprocessors))));
  layer_cuda::gate_product({.num_tokens = c.tokens,
                            .num_experts = c.experts,
                            .hidden_size = c.hidden,
                            .x_dtype = c.x,
                            .w_dtype = c.w,
                            .bias_dtype = Dtype::float32,
                            .x = static_cast<const std::byte*>(upload(x).data),
                            .x_stride = c.hidden + c.gap,
                            .w = static_cast<const std::byte*>(upload(w).data),
                            .bias = c.has_bias ? static_cast<const std::byte*>(upload(bias).data) : nullptr,
                            .logits = on_gpu.as<float>(),
                            .parts = parts.as<float>()},
                           multiprocessors, nullptr);
  cuda_check(cudaGetLastError(), "launch");
  fetch(on_gpu, logits);
  Nearness near;
  for (const std::int64_t t : some_of(c.tokens, random)) {
    for (int e = 0; e < c.experts; ++e) {
      double sum = c.has_bias ? bias.at(0, e) : 0;
      for (std::int64_t h = 0; h < c.hidden; ++h) sum += x.at(t, h) * w.at(e, h);
      near.add(logits.at(t, e), sum);
    }
  }
  near.expect_within(2e-6, "logits");
}

class DeviceGate : public OnGpu {};

TEST_F(DeviceGate, FewTokensInParts) {
  for (const auto& [x, w] : {std::pair{Dtype::bfloat16, Dtype::bfloat16},
                             {Dtype::float16, Dtype::float16},
                             {Dtype::float32, Dtype::float32},
                             {Dtype::bfloat16, Dtype::float32},
                             {Dtype::bfloat16, Dtype::float16}}) {
    check({.tokens = 1, .experts = 256, .hidden = 2048, .x = x, .w = w});
    check({.tokens = 67, .experts = 60, .hidden = 1096, .x = x, .w = w, .has_bias = true});
    check({.tokens = 5, .experts = 3, .hidden = 37, .x = x, .w = w, .gap = 3});
  }
}

TEST_F(DeviceGate, ManyTokensInAPiece) {
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float32}) {
    check({.tokens = 17'001, .experts = 70, .hidden = 200, .x = dtype, .w = dtype, .gap = 8, .has_bias = true});
  }
}

TEST_F(DeviceGate, NoTokens) { check({.tokens = 0, .experts = 8, .hidden = 64, .x = Dtype::bfloat16, .w = Dtype::bfloat16}); }

}  // namespace
}  // namespace tokenyard::device_test
