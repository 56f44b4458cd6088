// Gates on a GPU against the CPU's: ids, weights and loads bit for bit, gradients, statistics and losses within rounding. Logits have
// ties, NaN and infinities; tensors are strided.

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "device/gpus.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "tokenyard/device_routing.h"
#include "unit/expect_usage_error.h"
#include "unit/seeded_random.h"

namespace tokenyard::device_test {
namespace {

using testing::expect_usage_error;
using testing::SeededRandom;

class DeviceRoutingTest : public OnGpu {};

// A host vector and its copy in device memory.
template <class Number>
class Mirror {
 public:
  explicit Mirror(std::vector<Number> values) : host(std::move(values)), device_(value_or_throw(make_device_buffer(0, bytes()))) {
    cuda_check(cudaMemcpy(device_.data(), host.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void* on_device() const { return device_.data(); }
  std::vector<Number> fetch() const {
    std::vector<Number> values(host.size());
    cuda_check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    cuda_check(cudaMemcpy(values.data(), device_.data(), bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }
  std::vector<Number> host;

 private:
  std::size_t bytes() const { return host.size() * sizeof(Number); }
  DeviceBuffer device_;
};

Gate random_gate(SeededRandom& random, int num_experts) {
  const GateKind kinds[] = {GateKind::softmax, GateKind::sigmoid, GateKind::grouped_max, GateKind::bias_corrected, GateKind::per_group};
  Gate gate{.kind = random.pick(kinds), .score = random.one_in(2) ? Score::softmax : Score::sigmoid, .renormalise = random.one_in(2)};
  gate.scale = random.one_in(2) ? 1.0F : 2.5F;
  const int divisors[] = {1, 2, 4, 8};
  const bool has_groups = gate.kind != GateKind::softmax && gate.kind != GateKind::sigmoid;
  if (has_groups) gate.num_groups = random.pick(divisors);
  const int size = num_experts / gate.num_groups;
  if (gate.kind == GateKind::per_group) {
    gate.top_k = gate.num_groups * static_cast<int>(random.between(1, std::min(size, 64 / gate.num_groups)));
  } else {
    if (has_groups) gate.topk_groups = static_cast<int>(random.between(1, gate.num_groups));
    gate.top_k = static_cast<int>(random.between(1, std::min(gate.topk_groups * size, 64)));
    if (!has_groups) gate.top_k = static_cast<int>(random.between(1, std::min(num_experts, 64)));
  }
  if (gate.kind == GateKind::bias_corrected) gate.epsilon = 1e-20F;
  return gate;
}

// A batch, on the host and on the device.
struct Batch {
  static constexpr int kGap = 3;  // between rows
  Batch(SeededRandom& random, bool is_large)
      : tokens(random.between(0, 300)),
        experts(8 * random.between(1, is_large ? 512 : 40)),
        gate(random_gate(random, static_cast<int>(experts))),
        logits(draw_logits(random)),
        bias(draw(random, experts, 0.3F)),
        mask(draw_mask(random)),
        has_mask(random.one_in(2)) {}

  RoutingInput input(bool on_device) const {
    const auto of = [on_device](const auto& mirror) { return on_device ? mirror.on_device() : mirror.host.data(); };
    RoutingInput result;
    result.logits = ConstTensorView(of(logits), Dtype::float32, {tokens, experts});
    result.logits.strides[0] = experts + kGap;
    if (gate.kind == GateKind::bias_corrected) result.bias = ConstTensorView(of(bias), Dtype::float32, {experts});
    if (has_mask) result.mask = ConstTensorView(of(mask), Dtype::uint8, {tokens});
    return result;
  }
  std::string describe() const {
    return "kind " + std::to_string(static_cast<int>(gate.kind)) + " score " + std::to_string(static_cast<int>(gate.score)) + " tokens " +
           std::to_string(tokens) + " experts " + std::to_string(experts) + " top_k " + std::to_string(gate.top_k) + " groups " +
           std::to_string(gate.topk_groups) + "/" + std::to_string(gate.num_groups);
  }

  std::int64_t tokens, experts;
  Gate gate;
  Mirror<float> logits, bias;
  Mirror<std::uint8_t> mask;
  bool has_mask;

 private:
  static std::vector<float> draw(SeededRandom& random, std::int64_t count, float scale) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = scale * static_cast<float>(random.between(-1000, 1000)) / 1000.0F;
    return values;
  }
  // Few different numbers make ties; a row in eight has nothing finite.
  std::vector<float> draw_logits(SeededRandom& random) const {
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
    const float odd[] = {kNan, kInfinity, -kInfinity, 0.0F, -0.0F, 80.0F, -120.0F};
    const bool has_ties = random.one_in(2);
    std::vector<float> values(static_cast<std::size_t>(tokens * (experts + kGap)), kNan);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const bool is_empty = random.one_in(8);
      for (std::int64_t e = 0; e < experts; ++e) {
        float& value = values[static_cast<std::size_t>(t * (experts + kGap) + e)];
        value = has_ties ? static_cast<float>(random.between(-3, 3)) : static_cast<float>(random.between(-6000, 6000)) / 1000.0F;
        if (random.one_in(30)) value = random.pick(odd);
        if (is_empty) value = random.one_in(2) ? kNan : -kInfinity;
      }
    }
    return values;
  }
  std::vector<std::uint8_t> draw_mask(SeededRandom& random) const {
    std::vector<std::uint8_t> values(static_cast<std::size_t>(tokens));
    for (std::uint8_t& value : values) value = random.one_in(5) ? 0 : 1;
    return values;
  }
};

// What a device routing is written to; ids of either width.
struct Outputs {
  Outputs(const Batch& batch, bool wide)
      : is_wide(wide),
        pairs(batch.tokens * batch.gate.top_k),
        ids(std::vector<std::int32_t>(static_cast<std::size_t>(wide ? 2 * pairs : pairs), 77)),
        weights(std::vector<float>(static_cast<std::size_t>(pairs), -7.0F)),
        load(std::vector<std::int64_t>(static_cast<std::size_t>(batch.experts), 9)),
        routing{.topk_ids = {ids.on_device(), wide ? Dtype::int64 : Dtype::int32, {batch.tokens, batch.gate.top_k}},
                .topk_weights = {weights.on_device(), Dtype::float32, {batch.tokens, batch.gate.top_k}},
                .load = {load.on_device(), Dtype::int64, {batch.experts}}} {}
  std::vector<std::int64_t> fetch_ids() const {
    const std::vector<std::int32_t> words = ids.fetch();
    std::vector<std::int64_t> values(words.begin(), words.end());
    if (is_wide) {
      values.resize(static_cast<std::size_t>(pairs));
      std::memcpy(values.data(), words.data(), values.size() * sizeof(std::int64_t));
    }
    return values;
  }
  bool is_wide;
  std::int64_t pairs;
  Mirror<std::int32_t> ids;
  Mirror<float> weights;
  Mirror<std::int64_t> load;
  DeviceRouting routing;
};

void expect_same(const Outputs& out, const Routing& expected) {
  EXPECT_EQ(out.fetch_ids(), expected.topk_ids);
  EXPECT_EQ(out.load.fetch(), expected.load);
  const std::vector<float> weights = out.weights.fetch();
  ASSERT_EQ(weights.size(), expected.topk_weights.size());
  EXPECT_TRUE(weights.empty() || std::memcmp(weights.data(), expected.topk_weights.data(), weights.size() * sizeof(float)) == 0);
}

TEST_F(DeviceRoutingTest, ChoosesAndWeighsAsTheCpuBitForBit) {
  SeededRandom random;
  for (int round = 0; round < 60; ++round) {
    const Batch batch(random, round % 10 == 9);
    SCOPED_TRACE(batch.describe());
    const Outputs out(batch, random.one_in(2));
    route(batch.input(true), batch.gate, out.routing, nullptr);
    expect_same(out, route(batch.input(false), batch.gate));
  }
}

TEST_F(DeviceRoutingTest, ReadsLogitsOfSixteenBits) {
  SeededRandom random;
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
    const Batch batch(random, false);
    SCOPED_TRACE(batch.describe());
    std::vector<std::uint16_t> halves;
    for (const float logit : batch.logits.host)
      halves.push_back(dtype == Dtype::bfloat16 ? float_to_bfloat16(logit) : float_to_float16(logit));
    const Mirror<std::uint16_t> narrow(halves);
    const auto input = [&](bool on_device) {
      RoutingInput result = batch.input(on_device);
      result.logits.data = on_device ? narrow.on_device() : narrow.host.data();
      result.logits.dtype = dtype;
      return result;
    };
    const Outputs out(batch, true);
    route(input(true), batch.gate, out.routing, nullptr);
    expect_same(out, route(input(false), batch.gate));
  }
}

TEST_F(DeviceRoutingTest, ReplaysGivenIds) {
  SeededRandom random;
  for (int round = 0; round < 20; ++round) {
    const Batch batch(random, false);
    SCOPED_TRACE(batch.describe());
    std::vector<std::int64_t> ids(static_cast<std::size_t>(batch.tokens * batch.gate.top_k));
    for (std::int64_t& id : ids) id = random.one_in(6) ? -1 : random.between(0, batch.experts - 1);
    const Mirror<std::int64_t> given(ids);
    RoutingInput on_gpu = batch.input(true), on_cpu = batch.input(false);
    on_gpu.given_ids = ConstTensorView(given.on_device(), Dtype::int64, {batch.tokens, batch.gate.top_k});
    on_cpu.given_ids = ConstTensorView(given.host.data(), Dtype::int64, {batch.tokens, batch.gate.top_k});
    const Outputs out(batch, false);
    route(on_gpu, batch.gate, out.routing, nullptr);
    expect_same(out, route(on_cpu, batch.gate));
  }
}

void expect_near(const std::vector<float>& seen, const std::vector<float>& expected, const char* what) {
  double error = 0, size = 0;
  ASSERT_EQ(seen.size(), expected.size());
  for (std::size_t i = 0; i < seen.size(); ++i) {
    ASSERT_FALSE(std::isnan(seen[i])) << what << " " << i;
    error += std::pow(static_cast<double>(seen[i]) - expected[i], 2);
    size += std::pow(static_cast<double>(expected[i]), 2);
  }
  EXPECT_LE(std::sqrt(error), 1e-5 * std::sqrt(size)) << what;
}

// Gradients of both sides, from the same numbers to start with.
template <class OnGpu, class OnCpu>
void expect_same_gradient(const Batch& batch, const char* what, OnGpu&& on_gpu, OnCpu&& on_cpu) {
  const Mirror<float> d_logits(std::vector<float>(static_cast<std::size_t>(batch.tokens * batch.experts), 0.01F));
  std::vector<float> expected = d_logits.host;
  on_gpu(TensorView(d_logits.on_device(), Dtype::float32, {batch.tokens, batch.experts}));
  on_cpu(TensorView(expected.data(), Dtype::float32, {batch.tokens, batch.experts}));
  expect_near(d_logits.fetch(), expected, what);
}

TEST_F(DeviceRoutingTest, TrainingIsThatOfTheCpu) {
  SeededRandom random;
  for (int round = 0; round < 30; ++round) {
    const Batch batch(random, round % 10 == 9);
    SCOPED_TRACE(batch.describe());
    const RoutingInput on_gpu = batch.input(true), on_cpu = batch.input(false);
    const Outputs out(batch, true);
    route(on_gpu, batch.gate, out.routing, nullptr);
    const Routing routing = route(on_cpu, batch.gate);
    std::vector<float> d(static_cast<std::size_t>(out.pairs));
    for (float& value : d) value = static_cast<float>(random.between(-1000, 1000)) / 1000.0F;
    const Mirror<float> d_weights(d);
    const auto shape_of = [&](const void* data) { return ConstTensorView(data, Dtype::float32, {batch.tokens, batch.gate.top_k}); };
    expect_same_gradient(
        batch, "weights",
        [&](const TensorView& to) { add_weights_gradient(on_gpu, batch.gate, out.routing, shape_of(d_weights.on_device()), to, nullptr); },
        [&](const TensorView& to) { add_weights_gradient(on_cpu, batch.gate, routing, shape_of(d_weights.host.data()), to); });

    const Mirror<std::int64_t> load(std::vector<std::int64_t>(static_cast<std::size_t>(batch.experts), 5)), count({5});
    const Mirror<double> score_sums(std::vector<double>(static_cast<std::size_t>(batch.experts), 5)), squares({5}), loss({5});
    const Mirror<double> log_sums(std::vector<double>(static_cast<std::size_t>(batch.tokens), 5));
    const DeviceGateStatistics statistics = {.load = {load.on_device(), Dtype::int64, {batch.experts}},
                                             .score_sums = {score_sums.on_device(), Dtype::float64, {batch.experts}},
                                             .squared_log_sum_exps = {squares.on_device(), Dtype::float64, {1}},
                                             .num_tokens = {count.on_device(), Dtype::int64, {1}},
                                             .log_sum_exps = {log_sums.on_device(), Dtype::float64, {batch.tokens}}};
    gate_statistics(on_gpu, batch.gate, out.routing, statistics, nullptr);
    const GateStatistics expected = gate_statistics(on_cpu, batch.gate, routing);
    EXPECT_EQ(load.fetch(), expected.load);
    EXPECT_EQ(count.fetch()[0], expected.num_tokens);
    EXPECT_NEAR(squares.fetch()[0], expected.squared_log_sum_exps, 1e-9 * std::abs(expected.squared_log_sum_exps));
    const std::vector<double> sums = score_sums.fetch();
    for (std::size_t e = 0; e < sums.size(); ++e) EXPECT_NEAR(sums[e], expected.score_sums[e], 1e-5 * expected.score_sums[e] + 1e-9) << e;

    constexpr double kAlpha = 0.7;
    const TensorView loss_view(loss.on_device(), Dtype::float64, {1});
    balance_loss(statistics, kAlpha, loss_view, nullptr);
    EXPECT_NEAR(loss.fetch()[0], balance_loss(expected, kAlpha), 1e-5 * balance_loss(expected, kAlpha));
    z_loss(statistics, kAlpha, loss_view, nullptr);
    EXPECT_NEAR(loss.fetch()[0], z_loss(expected, kAlpha), 1e-9 * z_loss(expected, kAlpha));
    expect_same_gradient(
        batch, "balance", [&](const TensorView& to) { add_balance_gradient(on_gpu, batch.gate, statistics, kAlpha, to, nullptr); },
        [&](const TensorView& to) { add_balance_gradient(on_cpu, batch.gate, expected, kAlpha, to); });
    expect_same_gradient(
        batch, "z", [&](const TensorView& to) { add_z_gradient(on_gpu, batch.gate, statistics, kAlpha, to, nullptr); },
        [&](const TensorView& to) { add_z_gradient(on_cpu, batch.gate, expected, kAlpha, to); });

    std::vector<float> bias = batch.bias.host;
    update_gate_bias({batch.bias.on_device(), Dtype::float32, {batch.experts}}, statistics.load, 0.001F, nullptr);
    update_gate_bias(bias, expected.load, 0.001F);
    EXPECT_EQ(batch.bias.fetch(), bias);
  }
}

TEST_F(DeviceRoutingTest, WrongArgumentsAreNamed) {
  SeededRandom random;
  Batch batch(random, false);
  Outputs out(batch, true);
  out.routing.load.dtype = Dtype::int32;
  expect_usage_error([&] { route(batch.input(true), batch.gate, out.routing, nullptr); }, {"load is", "int32", "int64"});
  batch.gate = Gate::softmax(static_cast<int>(batch.experts) + 1, true);
  expect_usage_error([&] { route(batch.input(true), batch.gate, out.routing, nullptr); }, {"top_k"});
}

}  // namespace
}  // namespace tokenyard::device_test
