// The gated feed-forward on a GPU against float64, and permutations bit for bit against the CPU's.

#include <cuda_runtime_api.h>

#include <algorithm>

#include "device/experts_side.h"
#include "device/gpus.h"

namespace tokenyard::device_test {
namespace {

using testing::SeededRandom;

class DeviceFeedForward : public OnGpu {};
class DevicePermutation : public OnGpu {};

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
constexpr Activation kActivations[] = {{}, {.kind = ActivationKind::clamped, .limit = 0.8F, .alpha = 1.702F}};

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double activated(const Activation& a, double gate, double up) {
  if (a.kind == ActivationKind::silu) return gate * sigmoid(gate) * up;
  const double g = std::min<double>(gate, a.limit);
  return g * sigmoid(a.alpha * g) * (std::clamp<double>(up, -a.limit, a.limit) + 1.0);
}

// By differences: it knows nothing of the formula that is tested. To the side that no clamp cuts: across one they are half of the slope.
std::pair<double, double> activation_gradient(const Activation& a, double gate, double up) {
  constexpr double kStep = 1e-6;
  const bool clamps = a.kind == ActivationKind::clamped;
  const double gate_step = clamps && gate > a.limit ? kStep : -kStep;
  const double up_step = (clamps && std::abs(up) > a.limit) == (up > 0) ? kStep : -kStep;
  const double here = activated(a, gate, up);
  return {(activated(a, gate + gate_step, up) - here) / gate_step, (activated(a, gate, up + up_step) - here) / up_step};
}

struct Model {
  Model(SeededRandom& random, Dtype of_dtype, bool aligned)
      : dtype(of_dtype),
        c(testing::random_case(random, 60)),
        hidden(aligned ? 8 * random.between(1, 12) : random.between(1, 60)),
        width(aligned ? 8 * random.between(1, 10) : random.between(1, 50)),
        x(Buffer::rows(random, dtype, c, hidden, aligned ? 8 : 3)),
        dy(Buffer::places(random, dtype, c, hidden, aligned ? 8 : 3)),
        w13(Buffer::random(random, dtype, c.experts() * 2 * width, hidden)),
        w2(Buffer::random(random, dtype, c.experts() * hidden, width)),
        w13_bias(Buffer::random(random, dtype, c.experts(), 2 * width)),
        w2_bias(Buffer::random(random, dtype, c.experts(), hidden)) {}

  Dtype dtype;
  Case c;
  std::int64_t hidden, width;
  Buffer x, dy, w13, w2, w13_bias, w2_bias;
};

// One model on the device, forward and backward.
struct DeviceRun {
  DeviceRun(const Model& m, const Activation& of_activation, bool has_bias)
      : model(m),
        activation(of_activation),
        gate_up(Buffer::nan(m.dtype, m.c.groups.places, 2 * m.width, 0)),
        y(Buffer::nan(m.dtype, m.c.groups.places, m.hidden)),
        dx(Buffer::nan(m.dtype, m.c.groups.places, m.hidden)),
        d_w13(Buffer::filled(Dtype::float32, m.c.experts() * 2 * m.width, m.hidden, 0.5F)),
        d_w2(Buffer::filled(Dtype::float32, m.c.experts() * m.hidden, m.width, 0.5F)),
        d_w13_bias(Buffer::filled(Dtype::float32, m.c.experts(), 2 * m.width, 0.5F)),
        d_w2_bias(Buffer::filled(Dtype::float32, m.c.experts(), m.hidden, 0.5F)) {
    const std::int64_t experts = m.c.experts();
    ExpertWeights weights = {.w13 = shaped(upload(m.w13), {experts, 2, m.width, m.hidden}),
                             .w2 = shaped(upload(m.w2), {experts, m.hidden, m.width})};
    if (has_bias) weights.w13_bias = shaped(upload(m.w13_bias), {experts, 2, m.width});
    if (has_bias) weights.w2_bias = shaped(upload(m.w2_bias), {experts, m.hidden});
    const DeviceRowGroups groups = upload(m.c.groups);
    const TensorView x = upload(m.x), saved = upload(gate_up), out = upload(y), d_in = upload(dx);
    ExpertGradients gradients = {.w13 = shaped(upload(d_w13), {experts, 2, m.width, m.hidden}),
                                 .w2 = shaped(upload(d_w2), {experts, m.hidden, m.width})};
    gradients.w13_bias = shaped(upload(d_w13_bias), {experts, 2, m.width});
    gradients.w2_bias = shaped(upload(d_w2_bias), {experts, m.hidden});
    DeviceExperts experts_on_gpu({.device = 0});
    experts_on_gpu.experts_forward({.x = x, .gate_up = saved}, groups, weights, activation, out, nullptr);
    experts_on_gpu.experts_backward({.x = x, .gate_up = saved, .dy = upload(m.dy), .dx = d_in, .gradients = gradients}, groups, weights,
                                    activation, nullptr);
    fetch(saved, gate_up);
    fetch(out, y);
    fetch(d_in, dx);
    fetch(gradients.w13, d_w13);
    fetch(gradients.w2, d_w2);
    fetch(gradients.w13_bias, d_w13_bias);
    fetch(gradients.w2_bias, d_w2_bias);
  }
  const Model& model;
  Activation activation;
  Uploads upload;
  Buffer gate_up, y, dx, d_w13, d_w2, d_w13_bias, d_w2_bias;
};

// What forward and backward should give, from the gate_up that the device saved: near a clamp, rounding decides.
void expect_right(const DeviceRun& run, bool has_bias) {
  const Model& m = run.model;
  const std::int64_t width = m.width, hidden = m.hidden;
  expect_near(
      run.gate_up, m.c.groups,
      [&](int g, std::int64_t p, std::int64_t j) {
        double sum = has_bias ? m.w13_bias.at(g, j) : 0.0;
        for (std::int64_t h = 0; h < hidden; ++h) sum += m.x.at(m.c.row(p), h) * m.w13.at(g * 2 * width + j, h);
        return sum;
      },
      "gate_up");
  std::vector<double> act(static_cast<std::size_t>(m.c.groups.places * width)), d_gate_up(2 * act.size());
  std::vector<double> d_w13(static_cast<std::size_t>(m.c.experts() * 2 * width * hidden), 0.5), d_w2(d_w13.size() / 2, 0.5);
  std::vector<double> d_w13_bias(static_cast<std::size_t>(m.c.experts() * 2 * width), 0.5);
  for_each_place(m.c.groups, [&](int g, std::int64_t p) {
    for (std::int64_t i = 0; g >= 0 && i < width; ++i) {
      const double gate = run.gate_up.at(p, i), up = run.gate_up.at(p, width + i);
      double d_act = 0;
      for (std::int64_t h = 0; h < hidden; ++h) d_act += m.dy.at(p, h) * m.w2.at(g * hidden + h, i);
      const auto [d_gate, d_up] = activation_gradient(run.activation, gate, up);
      act[p * width + i] = activated(run.activation, gate, up);
      d_gate_up[p * 2 * width + i] = d_act * d_gate;
      d_gate_up[p * 2 * width + width + i] = d_act * d_up;
      for (std::int64_t h = 0; h < hidden; ++h) d_w2[(g * hidden + h) * width + i] += m.dy.at(p, h) * act[p * width + i];
    }
    for (std::int64_t j = 0; g >= 0 && j < 2 * width; ++j) {
      if (has_bias) d_w13_bias[g * 2 * width + j] += d_gate_up[p * 2 * width + j];
      for (std::int64_t h = 0; h < hidden; ++h)
        d_w13[(g * 2 * width + j) * hidden + h] += d_gate_up[p * 2 * width + j] * m.x.at(m.c.row(p), h);
    }
  });
  expect_near(
      run.y, m.c.groups,
      [&](int g, std::int64_t p, std::int64_t h) {
        double sum = has_bias ? m.w2_bias.at(g, h) : 0.0;
        for (std::int64_t i = 0; i < width; ++i) sum += act[p * width + i] * m.w2.at(g * hidden + h, i);
        return sum;
      },
      "y");
  expect_near(
      run.dx, m.c.groups,
      [&](int g, std::int64_t p, std::int64_t h) {
        double sum = 0;
        for (std::int64_t j = 0; j < 2 * width; ++j) sum += d_gate_up[p * 2 * width + j] * m.w13.at(g * 2 * width + j, h);
        return sum;
      },
      "dx");
  const auto expect_all = [&](const Buffer& out, const std::vector<double>& expected, const char* what) {
    Nearness near;
    for (std::int64_t i = 0; i < std::ssize(expected); ++i) near.add(out.at_index(i), expected[static_cast<std::size_t>(i)]);
    near.expect_within(relative_bound(m.dtype), what);
  };
  expect_all(run.d_w13, d_w13, "d w13");
  expect_all(run.d_w2, d_w2, "d w2");
  expect_all(run.d_w13_bias, d_w13_bias, "d w13_bias");
  std::vector<double> d_w2_bias(static_cast<std::size_t>(m.c.experts() * hidden), 0.5);
  for_each_place(m.c.groups, [&](int g, std::int64_t p) {
    for (std::int64_t h = 0; has_bias && g >= 0 && h < hidden; ++h) d_w2_bias[g * hidden + h] += m.dy.at(p, h);
  });
  expect_all(run.d_w2_bias, d_w2_bias, "d w2_bias");
}

TEST_F(DeviceFeedForward, IsItsDefinitionForwardAndBackward) {
  SeededRandom random;
  for (int round = 0; round < 18; ++round) {
    const Model model(random, kDtypes[round % 3], random.one_in(2));
    const Activation activation = kActivations[random.between(0, 1)];
    const bool has_bias = random.one_in(2);
    SCOPED_TRACE(model.c.describe() + std::string(name(model.dtype)) + " hidden " + std::to_string(model.hidden) + " width " +
                 std::to_string(model.width) + (has_bias ? " biases" : "") +
                 (activation.kind == ActivationKind::silu ? " silu" : " clamped"));
    expect_right(DeviceRun(model, activation, has_bias), has_bias);
  }
}

void expect_same_bits(const Buffer& a, const Buffer& b, const char* what) {
  ASSERT_EQ(a.num_bytes(), b.num_bytes());
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.num_bytes()), 0) << what;
}

// Rows, their local ids (some absent, some twice the same), and weights.
struct Routed {
  Routed(SeededRandom& random, Dtype dtype, std::int64_t columns, std::int64_t most_rows = 300)
      : num_rows(random.between(1, most_rows)), top_k(random.between(1, 9)), num_experts(static_cast<int>(random.between(1, 40))) {
    for (std::int64_t i = 0; i < num_rows * top_k; ++i)
      ids.push_back(static_cast<std::int32_t>(random.one_in(3) ? -1 : random.between(0, num_experts - 1)));
    groups = RowGroups::gathered(ids_view(), num_experts);
    rows = std::make_unique<Buffer>(Buffer::random(random, dtype, num_rows, columns));
    places = std::make_unique<Buffer>(Buffer::random(random, dtype, std::max<std::int64_t>(groups.places, 1), columns));
    weights = std::make_unique<Buffer>(Buffer::random(random, Dtype::float32, num_rows, top_k));
  }
  ConstTensorView ids_view() const { return {ids.data(), Dtype::int32, {num_rows, top_k}}; }
  TensorView of_places(const TensorView& view) const { return {view.data, view.dtype, {groups.places, view.shape[1]}}; }

  std::int64_t num_rows, top_k;
  int num_experts;
  std::vector<std::int32_t> ids;
  RowGroups groups;
  std::unique_ptr<Buffer> rows, places, weights;
};

TEST_F(DevicePermutation, GroupsAreThoseOfTheCpu) {
  SeededRandom random;
  for (int round = 0; round < 10; ++round) {
    const Routed routed(random, Dtype::float32, 1, round % 2 == 0 ? 9 : 9000);
    Uploads upload;
    DeviceExperts experts({.device = 0});
    const ConstTensorView ids = upload.numbers(routed.ids, Dtype::int32);
    const DeviceRowGroups groups = experts.gather({ids.data, Dtype::int32, {routed.num_rows, routed.top_k}}, routed.num_experts, nullptr);
    const auto download = [](const ConstTensorView& view, std::int64_t count) {
      std::vector<std::int32_t> numbers(static_cast<std::size_t>(count));
      cuda_check(cudaMemcpy(numbers.data(), view.data, numbers.size() * 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
      return std::vector<std::int64_t>(numbers.begin(), numbers.end());
    };
    cuda_check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    EXPECT_EQ(download(groups.counts, routed.num_experts), routed.groups.counts);
    EXPECT_EQ(download(groups.begins, routed.num_experts), routed.groups.begins);
    EXPECT_EQ(download(groups.rows, routed.groups.places), routed.groups.rows);
  }
}

TEST_F(DevicePermutation, GivesTheBitsOfTheCpu) {
  SeededRandom random;
  for (int round = 0; round < 12; ++round) {
    const Dtype dtype = kDtypes[round % 3];
    const std::int64_t columns = random.one_in(2) ? 64 : random.between(1, 90);
    const Routed routed(random, dtype, columns);
    SCOPED_TRACE(std::string(name(dtype)) + " columns " + std::to_string(columns));
    const bool has_weights = random.one_in(2);
    Uploads upload;
    DeviceExperts experts({.device = 0});
    const DeviceRowGroups groups = upload(routed.groups);
    const ConstTensorView ids = upload.numbers(routed.ids, Dtype::int32);
    FoldInput on_cpu = {.places = routed.of_places(routed.places->view()), .local_ids = routed.ids_view()};
    const TensorView places = routed.of_places(upload(*routed.places));
    FoldInput on_gpu = {.places = places, .local_ids = {ids.data, Dtype::int32, {routed.num_rows, routed.top_k}}};
    if (has_weights) on_cpu.row_weights = std::as_const(*routed.weights).view();
    if (has_weights) on_gpu.row_weights = upload(*routed.weights);

    Buffer permuted = Buffer::nan(dtype, routed.groups.places, columns), expected = permuted;
    const TensorView permuted_on_gpu = upload(permuted), rows = upload(*routed.rows);
    experts.permute(rows, groups, permuted_on_gpu, nullptr);
    fetch(permuted_on_gpu, permuted);
    permute(std::as_const(*routed.rows).view(), routed.groups, expected.view());
    expect_same_bits(permuted, expected, "permute");

    Buffer folded = Buffer::nan(dtype, routed.num_rows, columns), expected_fold = folded;
    const TensorView folded_on_gpu = upload(folded);
    experts.unpermute(on_gpu, groups, folded_on_gpu, nullptr);
    fetch(folded_on_gpu, folded);
    unpermute(on_cpu, routed.groups, expected_fold.view());
    expect_same_bits(folded, expected_fold, "unpermute");

    Buffer d_places = Buffer::nan(dtype, routed.groups.places, columns), expected_d = d_places;
    Buffer d_weights = Buffer::nan(Dtype::float32, routed.num_rows, routed.top_k, 0), expected_weights = d_weights;
    const TensorView d_on_gpu = upload(d_places), d_weights_on_gpu = upload(d_weights);
    experts.unpermute_backward(on_gpu, groups, rows, d_on_gpu, d_weights_on_gpu, nullptr);
    fetch(d_on_gpu, d_places);
    fetch(d_weights_on_gpu, d_weights);
    unpermute_backward(on_cpu, routed.groups, std::as_const(*routed.rows).view(), expected_d.view(), expected_weights.view());
    expect_same_bits(d_places, expected_d, "d places");
    expect_same_bits(d_weights, expected_weights, "d row weights");
  }
}

}  // namespace
}  // namespace tokenyard::device_test
